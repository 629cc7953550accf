//! Reads a machine request: the goal that the planner sees, and the class that it does not.

use std::net::IpAddr;

use crate::cloud::class::parse_class;
use crate::cloud::{BootProfile, Cloud, Scope, Timestamp};
use crate::omni::kinds::MachineRequestSpec;
use crate::omni::resource::{Metadata, Phase};
use crate::talos::image::talos_version;
use crate::talos::schematic::Schematic;
use crate::words::one_line;

use super::name::instance_name;

/// What the planner works towards.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Goal<S> {
    /// Nothing to do: the request tears down without our finalizer, and goes by itself; or its claim cannot be read, and whatever we
    /// did could lose what the claim remembers.
    Leave,
    /// The instance runs.
    Run {
        /// The scopes of the class, in the order to try.
        scopes: Vec<S>,
    },
    /// The request runs, and cannot be answered as it is written.
    Invalid {
        /// Why, for a person.
        reason: String,
        /// The scopes of the class, where it parses.
        scopes: Option<Vec<S>>,
    },
    /// The request tears down, and our finalizer holds it.
    TearDown {
        /// The scopes of the class, where it parses.
        scopes: Option<Vec<S>>,
    },
    /// There is no such request any more, but something of ours is left of it.
    Gone {
        /// A running request of the same ID, made anew, waits for the end of the old one.
        superseded: bool,
    },
}

impl<S: Scope> Goal<S> {
    /// The scopes of the class.
    #[must_use]
    pub fn class_scopes(&self) -> &[S] {
        match self {
            Self::Run { scopes } => scopes,
            Self::Invalid { scopes, .. } | Self::TearDown { scopes } => scopes.as_deref().unwrap_or_default(),
            Self::Leave | Self::Gone { .. } => &[],
        }
    }
}

/// A request that can be answered, read once.
#[derive(Debug)]
pub struct Desired<C: Cloud> {
    /// What the user wrote.
    pub class: C::Class,
    /// Where the instance may live, in the order to try.
    pub scopes: Vec<C::Scope>,
    /// What it boots.
    pub boot: BootProfile,
    /// Talos version, without a leading "v".
    pub talos_version: String,
    /// The schematic of its image.
    pub schematic: Schematic,
    /// Nameservers, of the class or else of the daemon.
    pub nameservers: Vec<IpAddr>,
}

/// What reading a request gave.
#[derive(Debug)]
pub enum Parsed<C: Cloud> {
    /// It can be answered.
    Good(Box<Desired<C>>),
    /// It cannot.
    Bad {
        /// Every fault, for a person.
        reason: String,
        /// The scopes of the class, where that much could be read.
        scopes: Option<Vec<C::Scope>>,
    },
}

impl<C: Cloud> Parsed<C> {
    /// Reads a request. `nameservers` are the daemon's own.
    #[must_use]
    pub fn read(request: &MachineRequestSpec, nameservers: &[IpAddr]) -> Self {
        let class: C::Class = match parse_class(&request.provider_data) {
            Ok(class) => class,
            Err(faults) => {
                return Self::Bad {
                    reason: told(&faults),
                    scopes: None,
                };
            }
        };
        let scopes = C::scopes(&class);
        let mut faults = C::validate(&class);
        let version = talos_version(&request.talos_version).unwrap_or_else(|fault| {
            faults.push(fault);
            String::new()
        });
        let boot = C::boot(&class);
        let schematic = Schematic::new(request, &boot).map_err(|fault| faults.push(fault));
        let (Ok(schematic), true) = (schematic, faults.is_empty()) else {
            return Self::Bad {
                reason: told(&faults),
                scopes: Some(scopes),
            };
        };
        let nameservers = if boot.nameservers.is_empty() {
            nameservers.to_vec()
        } else {
            boot.nameservers.clone()
        };
        Self::Good(Box::new(Desired {
            class,
            scopes,
            boot,
            talos_version: version,
            schematic,
            nameservers,
        }))
    }

    /// The scopes of the class, where it parses.
    #[must_use]
    pub fn scopes(&self) -> Option<&[C::Scope]> {
        match self {
            Self::Good(desired) => Some(&desired.scopes),
            Self::Bad { scopes, .. } => scopes.as_deref(),
        }
    }

    /// The request, if it can be answered.
    #[must_use]
    pub fn good(&self) -> Option<&Desired<C>> {
        match self {
            Self::Good(desired) => Some(desired),
            Self::Bad { .. } => None,
        }
    }
}

/// Most faults of one request that are told, and most characters of each: they are read on Omni's screen.
const FAULTS: usize = 20;
const FAULT_CHARS: usize = 400;

/// Faults in one line. They quote what a user wrote, which may be anything.
fn told(faults: &[String]) -> String {
    let mut told: Vec<String> = faults
        .iter()
        .take(FAULTS)
        .map(|fault| one_line(fault, FAULT_CHARS))
        .collect();
    if faults.len() > FAULTS {
        told.push(format!("and {} more", faults.len() - FAULTS));
    }
    told.join("; ")
}

/// The goal for a request, fixed before anything is observed. `claimed` is when the request of the claim was made.
#[must_use]
pub fn goal<C: Cloud>(
    request: Option<(&Metadata, &Parsed<C>)>,
    claimed: Option<Timestamp>,
    finalizer: &str,
) -> Goal<C::Scope> {
    let Some((metadata, parsed)) = request else {
        return Goal::Gone { superseded: false };
    };
    let running = metadata.phase == Phase::Running;
    if claimed.is_some_and(|created| created != metadata.created) {
        return Goal::Gone { superseded: running };
    }
    match (running, parsed) {
        (true, Parsed::Good(desired)) => Goal::Run {
            scopes: desired.scopes.clone(),
        },
        (true, Parsed::Bad { reason, scopes }) => Goal::Invalid {
            reason: reason.clone(),
            scopes: scopes.clone(),
        },
        (false, parsed) if metadata.finalizers.contains(finalizer) => Goal::TearDown {
            scopes: parsed.scopes().map(<[_]>::to_vec),
        },
        (false, _) => Goal::Leave,
    }
}

/// The instance name of a request in this cloud.
#[must_use]
pub fn name<C: Cloud>(request: &str) -> String {
    instance_name(request, C::LIMITS)
}
