//! Decides whether an instance can be created as asked, and creates it with its disks, interfaces and addresses.
//!
//! The checks and their order are nexus's: first those of `app/instance.rs` (`project_create_instance`), then
//! those that its saga would meet (`sagas/instance_create.rs`), and only then the effect: a saga that fails
//! leaves nothing behind. A creation that asks for a start answers 201 whatever becomes of the start: placement
//! fails only later, and silently.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oxide::types;
use oxide::types::InstanceState as State;
use uuid::Uuid;

use super::answer::{Ask, Outcome, Pick, Refusal, Reply, Result};
use super::disks::{NewDisk, check_disk};
use super::instances::check_size;
use super::rack::{Due, Instance, Kind, Rack};

// Nexus's constants (`app/mod.rs`).
const MAX_DISKS: usize = 12;
const MAX_NICS: usize = 8;
const MAX_EXTERNAL_IPS: usize = 32;
const MAX_EPHEMERAL_IPS: usize = 2;
const MAX_MULTICAST_GROUPS: usize = 32;
const MAX_USER_DATA: usize = 32 * 1024;

/// The checks of `project_create_instance`, then those which its saga would meet, and only then the effect: a
/// saga that fails leaves nothing behind.
pub(super) fn create(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let project = rack.needed_project(ask, ask.query("project"))?;
    let body: types::InstanceCreate = ask.body()?;
    let user_data = STANDARD
        .decode(&body.user_data)
        .map_err(|e| Refusal::malformed(format!("unable to parse JSON body: user_data: {e}")))?;
    if user_data.len() > MAX_USER_DATA {
        return Err(Refusal::malformed(format!(
            "unable to parse JSON body: user_data: maximum length is {MAX_USER_DATA} bytes"
        )));
    }
    check_size(body.ncpus.0, body.memory.0)?;
    let disks = check_disks(rack, ask, project, &body)?;
    check_counts(rack, &body)?;
    let groups = body
        .anti_affinity_groups
        .iter()
        .map(|wanted| {
            let within = matches!(wanted, types::NameOrId::Name(_)).then(|| project.to_string());
            rack.find(
                ask,
                &Kind::GROUP,
                &rack.groups,
                &wanted.to_string(),
                within.as_deref(),
            )
            .map(|group| group.id)
        })
        .collect::<Result<BTreeSet<_>>>()?;
    // No user of the sandbox has SSH keys.
    if let Some(key) = body.ssh_public_keys.iter().flatten().next() {
        return Err(Refusal::not_found("ssh-key", &Pick::from(key)));
    }

    // From here on nexus is in its saga.
    if rack.instance_named(project, body.name.as_str()).is_some() {
        return Err(Refusal::exists(Kind::INSTANCE.resource, body.name.as_str()));
    }
    let nics = check_nics(rack, project, &body.network_interfaces)?;
    let floating = check_external_ips(rack, ask, project, &body.external_ips)?;
    let mut names = BTreeSet::new();
    let mut storage = 0;
    for disk in &disks {
        if let Planned::New(disk) = disk {
            if rack.disk_named(project, disk.name()).is_some() || !names.insert(disk.name().to_owned()) {
                return Err(Refusal::exists(Kind::DISK.resource, disk.name()));
            }
            storage += disk.quota();
        }
    }
    rack.check_storage(storage)?;

    let id = rack.id();
    let boot_disk_id = attach(rack, project, id, disks, body.boot_disk.is_some());
    let nics = make_nics(rack, id, nics)?;
    let ips = make_ips(rack, id, &body, &nics, &floating);
    let now = rack.now();
    let start = body.start;
    let view = types::Instance {
        auto_restart_cooldown_expiration: None,
        auto_restart_enabled: body.auto_restart_policy != Some(types::InstanceAutoRestartPolicy::Never),
        auto_restart_policy: body.auto_restart_policy,
        boot_disk_id,
        cpu_platform: body.cpu_platform,
        description: body.description.clone(),
        enable_jumbo_frames: body.enable_jumbo_frames,
        hostname: body.hostname.to_string(),
        id,
        memory: body.memory.clone(),
        name: body.name.clone(),
        ncpus: body.ncpus.clone(),
        project_id: project,
        run_state: State::Creating,
        time_created: now,
        time_last_auto_restarted: None,
        time_modified: now,
        time_run_state_updated: now,
    };
    let instance = Instance {
        view,
        turn: 0,
        sled: None,
        user_data,
        console: Vec::new(),
        nics,
        ips,
        groups,
        asked: Some(body),
    };
    rack.instances.insert(id, instance);
    rack.touch();
    rack.plan(rack.pace.create, Due::InstanceCreated { id, turn: 0, start });
    Ok(Outcome::when(move |rack| match rack.instances.get(&id) {
        // Deleted behind the saga's back.
        None => Some(Err(Refusal::not_found("instance", &Pick::Id(id)))),
        Some(it) if it.view.run_state == State::Creating => None,
        Some(it) => Some(Reply::json(201, &it.view)),
    }))
}

enum Planned {
    New(NewDisk),
    Attach(Uuid),
}

fn check_disks(rack: &Rack, ask: &Ask, project: Uuid, body: &types::InstanceCreate) -> Result<Vec<Planned>> {
    let all: Vec<_> = body.boot_disk.iter().chain(&body.disks).cloned().collect();
    if all.len() > MAX_DISKS {
        return Err(Refusal::invalid(format!(
            "cannot attach more than {MAX_DISKS} disks to instance"
        )));
    }
    all.into_iter()
        .map(|disk| match disk {
            types::InstanceDiskAttachment::Create {
                description,
                disk_backend,
                name,
                size,
            } => {
                let disk = types::DiskCreate {
                    description,
                    disk_backend,
                    name,
                    size,
                };
                check_disk(rack, ask, project, disk).map(Planned::New)
            }
            types::InstanceDiskAttachment::Attach { name } => {
                let id = rack
                    .disk_named(project, name.as_str())
                    .ok_or_else(|| Refusal::not_found("disk", &Pick::Name(name.to_string())))?;
                let state = rack.disks.get(&id).map(|disk| &disk.view.state);
                match state {
                    Some(types::DiskState::Detached) => Ok(Planned::Attach(id)),
                    Some(
                        types::DiskState::Attached(_)
                        | types::DiskState::Attaching(_)
                        | types::DiskState::Detaching(_),
                    ) => Err(Refusal::invalid(format!(
                        "cannot attach disk \"{}\": disk is attached to another instance",
                        name.as_str()
                    ))),
                    _ => Err(Refusal::invalid(format!(
                        "cannot attach disk \"{}\": invalid state {state:?}",
                        name.as_str()
                    ))),
                }
            }
        })
        .collect()
}

fn check_counts(rack: &Rack, body: &types::InstanceCreate) -> Result<()> {
    if body.external_ips.len() > MAX_EXTERNAL_IPS {
        return Err(Refusal::invalid(format!(
            "An instance may not have more than {MAX_EXTERNAL_IPS} external IP addresses"
        )));
    }
    if body.multicast_groups.len() > MAX_MULTICAST_GROUPS {
        return Err(Refusal::invalid(format!(
            "An instance may not join more than {MAX_MULTICAST_GROUPS} multicast groups"
        )));
    }
    if body.enable_jumbo_frames && !rack.limits.jumbo_frames {
        return Err(Refusal::invalid(
            "enable_jumbo_frames may only be set on an instance when the fleet-wide jumbo-frames opt-in \
             is enabled by a fleet administrator",
        ));
    }
    let ephemeral = body
        .external_ips
        .iter()
        .filter(|ip| matches!(ip, types::ExternalIpCreate::Ephemeral { .. }));
    if ephemeral.count() > MAX_EPHEMERAL_IPS {
        return Err(Refusal::invalid(format!(
            "An instance may not have more than {MAX_EPHEMERAL_IPS} ephemeral IP addresses"
        )));
    }
    if let types::InstanceNetworkInterfaceAttachment::Create(nics) = &body.network_interfaces {
        if nics.len() > MAX_NICS {
            return Err(Refusal::invalid(format!(
                "An instance may not have more than {MAX_NICS} network interfaces"
            )));
        }
        // Nexus wants exactly one VPC, so an empty list is refused with the same words.
        let vpcs: BTreeSet<_> = nics.iter().map(|nic| nic.vpc_name.as_str()).collect();
        if vpcs.len() != 1 {
            return Err(Refusal::invalid("All interfaces must be in the same VPC"));
        }
    }
    Ok(())
}

/// An interface that passed every check.
struct NewNic {
    create: types::InstanceNetworkInterfaceCreate,
    vpc: Uuid,
    subnet: Uuid,
}

fn check_nics(
    rack: &Rack,
    project: Uuid,
    wanted: &types::InstanceNetworkInterfaceAttachment,
) -> Result<Vec<NewNic>> {
    let default = |ip_config| -> Result<_> {
        Ok(vec![types::InstanceNetworkInterfaceCreate {
            description: "default primary interface".to_owned(),
            ip_config,
            name: Rack::name("net0")?,
            subnet_name: Rack::name("default")?,
            vpc_name: Rack::name("default")?,
        }])
    };
    let v4 = types::PrivateIpv4StackCreate {
        ip: types::Ipv4Assignment::Auto,
        transit_ips: Vec::new(),
    };
    let v6 = types::PrivateIpv6StackCreate {
        ip: types::Ipv6Assignment::Auto,
        transit_ips: Vec::new(),
    };
    let nics = match wanted {
        types::InstanceNetworkInterfaceAttachment::Create(nics) => nics.clone(),
        types::InstanceNetworkInterfaceAttachment::DefaultIpv4 => {
            default(types::PrivateIpStackCreate::V4(v4))?
        }
        types::InstanceNetworkInterfaceAttachment::DefaultIpv6 => {
            default(types::PrivateIpStackCreate::V6(v6))?
        }
        types::InstanceNetworkInterfaceAttachment::DefaultDualStack => {
            default(types::PrivateIpStackCreate::DualStack { v4, v6 })?
        }
        types::InstanceNetworkInterfaceAttachment::None => Vec::new(),
    };
    let (mut names, mut subnets) = (BTreeSet::new(), BTreeSet::new());
    let mut planned = Vec::new();
    for create in nics {
        let vpc = rack
            .vpc_named(project, create.vpc_name.as_str())
            .ok_or_else(|| Refusal::not_found("vpc", &Pick::Name(create.vpc_name.to_string())))?;
        let subnet = rack
            .subnet_named(vpc, create.subnet_name.as_str())
            .ok_or_else(|| Refusal::not_found("vpc-subnet", &Pick::Name(create.subnet_name.to_string())))?;
        if !names.insert(create.name.to_string()) {
            return Err(Refusal::exists(
                "instance-network-interface",
                create.name.as_str(),
            ));
        }
        if !subnets.insert(subnet) {
            return Err(Refusal::invalid(
                "Each interface must be in a distinct VPC Subnet",
            ));
        }
        if let Some(ip) = explicit(&create.ip_config)
            .into_iter()
            .find(|ip| taken(rack, subnet, *ip))
        {
            return Err(Refusal::invalid(format!(
                "The IP address '{ip}' is not available"
            )));
        }
        planned.push(NewNic { create, vpc, subnet });
    }
    Ok(planned)
}

fn explicit(stack: &types::PrivateIpStackCreate) -> Vec<IpAddr> {
    let v4 = |stack: &types::PrivateIpv4StackCreate| match stack.ip {
        types::Ipv4Assignment::Explicit(ip) => Some(IpAddr::V4(ip)),
        types::Ipv4Assignment::Auto => None,
    };
    let v6 = |stack: &types::PrivateIpv6StackCreate| match stack.ip {
        types::Ipv6Assignment::Explicit(ip) => Some(IpAddr::V6(ip)),
        types::Ipv6Assignment::Auto => None,
    };
    match stack {
        types::PrivateIpStackCreate::V4(stack) => v4(stack).into_iter().collect(),
        types::PrivateIpStackCreate::V6(stack) => v6(stack).into_iter().collect(),
        types::PrivateIpStackCreate::DualStack { v4: four, v6: six } => {
            v4(four).into_iter().chain(v6(six)).collect()
        }
    }
}

fn taken(rack: &Rack, subnet: Uuid, ip: IpAddr) -> bool {
    rack.instances
        .values()
        .flat_map(|it| &it.nics)
        .filter(|nic| nic.subnet_id == subnet)
        .any(|nic| match (&nic.ip_stack, ip) {
            (types::PrivateIpStack::V4(v4) | types::PrivateIpStack::DualStack { v4, .. }, IpAddr::V4(ip)) => {
                v4.ip == ip
            }
            (types::PrivateIpStack::V6(v6) | types::PrivateIpStack::DualStack { v6, .. }, IpAddr::V6(ip)) => {
                v6.ip == ip
            }
            _ => false,
        })
}

fn make_nics(
    rack: &mut Rack,
    instance: Uuid,
    planned: Vec<NewNic>,
) -> Result<Vec<types::InstanceNetworkInterface>> {
    let mut nics = Vec::new();
    for (index, NewNic { create, vpc, subnet }) in planned.into_iter().enumerate() {
        let (id, now, mac) = (rack.id(), rack.now(), rack.mac()?);
        let nth = rack.next_address();
        // Past the five that nexus keeps for itself; the sandbox never runs out.
        let next4 = Ipv4Addr::from_bits(Ipv4Addr::new(172, 30, 0, 5).to_bits() + nth % 0x3_F000);
        let next6 = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, (nth >> 16) as u16, (nth & 0xffff) as u16);
        let v4 = |stack: types::PrivateIpv4StackCreate| types::PrivateIpv4Stack {
            ip: match stack.ip {
                types::Ipv4Assignment::Explicit(ip) => ip,
                types::Ipv4Assignment::Auto => next4,
            },
            transit_ips: stack.transit_ips,
        };
        let v6 = |stack: types::PrivateIpv6StackCreate| types::PrivateIpv6Stack {
            ip: match stack.ip {
                types::Ipv6Assignment::Explicit(ip) => ip,
                types::Ipv6Assignment::Auto => next6,
            },
            transit_ips: stack.transit_ips,
        };
        nics.push(types::InstanceNetworkInterface {
            description: create.description,
            id,
            instance_id: instance,
            ip_stack: match create.ip_config {
                types::PrivateIpStackCreate::V4(stack) => types::PrivateIpStack::V4(v4(stack)),
                types::PrivateIpStackCreate::V6(stack) => types::PrivateIpStack::V6(v6(stack)),
                types::PrivateIpStackCreate::DualStack { v4: four, v6: six } => {
                    types::PrivateIpStack::DualStack {
                        v4: v4(four),
                        v6: v6(six),
                    }
                }
            },
            mac,
            name: create.name,
            primary: index == 0,
            subnet_id: subnet,
            time_created: now,
            time_modified: now,
            vpc_id: vpc,
        });
    }
    Ok(nics)
}

/// Checks pools and floating addresses, and returns the floating ones.
fn check_external_ips(
    rack: &Rack,
    ask: &Ask,
    project: Uuid,
    wanted: &[types::ExternalIpCreate],
) -> Result<BTreeMap<usize, Uuid>> {
    let used: usize = rack
        .instances
        .values()
        .map(|it| {
            it.ips
                .iter()
                .filter(|ip| matches!(ip, types::ExternalIp::Ephemeral { .. }))
                .count()
        })
        .sum();
    let mut ephemeral = 0;
    let mut floating = BTreeMap::new();
    for (index, ip) in wanted.iter().enumerate() {
        match ip {
            types::ExternalIpCreate::Ephemeral { pool_selector } => {
                if let types::PoolSelector::Explicit { pool } = pool_selector
                    && pool.to_string() != "default"
                    && pool.to_string() != rack.pool.to_string()
                {
                    return Err(Refusal::not_found("ip-pool", &Pick::from(pool)));
                }
                ephemeral += 1;
                if used + ephemeral > rack.limits.external_ips {
                    return Err(Refusal::capacity("No external IP addresses available"));
                }
            }
            types::ExternalIpCreate::Floating { floating_ip } => {
                let within = matches!(floating_ip, types::NameOrId::Name(_)).then(|| project.to_string());
                let found = rack.find(
                    ask,
                    &Kind::FLOATING_IP,
                    &rack.floating_ips,
                    &floating_ip.to_string(),
                    within.as_deref(),
                )?;
                if found.project_id != project {
                    return Err(Refusal::invalid(
                        "floating IP must be in the same project as the instance",
                    ));
                }
                if found.instance_id.is_some() {
                    return Err(Refusal::invalid(
                        "floating IP cannot be attached to one instance while still attached to another",
                    ));
                }
                floating.insert(index, found.id);
            }
        }
    }
    Ok(floating)
}

fn make_ips(
    rack: &mut Rack,
    instance: Uuid,
    body: &types::InstanceCreate,
    nics: &[types::InstanceNetworkInterface],
    floating: &BTreeMap<usize, Uuid>,
) -> Vec<types::ExternalIp> {
    let mut ips = Vec::new();
    if !nics.is_empty() {
        ips.push(types::ExternalIp::Snat {
            first_port: 0,
            ip: rack.external_ip(),
            ip_pool_id: rack.pool,
            last_port: 16383,
        });
    }
    for index in 0..body.external_ips.len() {
        match floating.get(&index).and_then(|id| rack.floating_ips.get_mut(id)) {
            None => ips.push(types::ExternalIp::Ephemeral {
                ip: rack.external_ip(),
                ip_pool_id: rack.pool,
            }),
            Some(ip) => {
                ip.instance_id = Some(instance);
                ips.push(types::ExternalIp::Floating {
                    description: ip.description.clone(),
                    id: ip.id,
                    instance_id: ip.instance_id,
                    ip: ip.ip,
                    ip_pool_id: ip.ip_pool_id,
                    name: ip.name.clone(),
                    project_id: ip.project_id,
                    time_created: ip.time_created,
                    time_modified: ip.time_modified,
                });
            }
        }
    }
    ips
}

/// Makes or takes the disks, attaching until the instance is made, and returns the boot disk.
fn attach(rack: &mut Rack, project: Uuid, instance: Uuid, disks: Vec<Planned>, boots: bool) -> Option<Uuid> {
    let mut first = None;
    for disk in disks {
        let id = match disk {
            Planned::New(disk) => rack.add_disk(project, disk).0,
            Planned::Attach(id) => id,
        };
        if let Some(disk) = rack.disks.get_mut(&id) {
            disk.view.state = types::DiskState::Attaching(instance);
        }
        first = first.or(Some(id));
    }
    first.filter(|_| boots)
}
