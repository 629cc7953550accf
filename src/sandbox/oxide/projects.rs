//! Answers for what instances are made in: the user, projects, networks, anti-affinity groups, addresses,
//! quotas.
//!
//! A new project gets a VPC `default` with a subnet `default`, as nexus gives it one (`app/project.rs`,
//! `sagas/project_create.rs`).

use std::net::Ipv4Addr;

use oxide::types;
use serde::Serialize;
use uuid::Uuid;

use super::answer::{Ask, Outcome, Pick, Refusal, Reply, Result, Scan};
use super::rack::{Kind, Rack};

impl Rack {
    /// Makes a project and its default network.
    pub(super) fn add_project(&mut self, name: types::Name, description: String) -> Result<Uuid> {
        if self.projects.values().any(|it| it.name == name) {
            return Err(Refusal::exists("project", name.as_str()));
        }
        let (id, now) = (self.id(), self.now());
        let project = types::Project {
            description,
            id,
            name,
            time_created: now,
            time_modified: now,
        };
        self.projects.insert(id, project);
        let vpc = self.add_vpc(id, "default")?;
        self.add_subnet(vpc, "default")?;
        self.touch();
        Ok(id)
    }

    pub(super) fn add_vpc(&mut self, project: Uuid, name: &str) -> Result<Uuid> {
        let name = Self::name(name)?;
        if self.vpc_named(project, name.as_str()).is_some() {
            return Err(Refusal::exists("vpc", name.as_str()));
        }
        let (id, now, router) = (self.id(), self.now(), self.id());
        let prefix = format!("fd00:{:x}::/48", self.vpcs.len() + 1);
        let vpc = types::Vpc {
            description: "made by the sandbox".to_owned(),
            dns_name: name.clone(),
            id,
            ipv6_prefix: types::Ipv6Net::try_from(prefix).map_err(|_| Refusal::internal())?,
            name,
            project_id: project,
            system_router_id: router,
            time_created: now,
            time_modified: now,
        };
        self.vpcs.insert(id, vpc);
        Ok(id)
    }

    pub(super) fn add_subnet(&mut self, vpc: Uuid, name: &str) -> Result<Uuid> {
        let name = Self::name(name)?;
        if self.subnet_named(vpc, name.as_str()).is_some() {
            return Err(Refusal::exists("vpc-subnet", name.as_str()));
        }
        let (id, now) = (self.id(), self.now());
        // 172.30.0.0/22 is nexus's own first one; the next ones follow it.
        let nth = u32::try_from(self.subnets.values().filter(|it| it.vpc_id == vpc).count()).unwrap_or(0);
        let block = Ipv4Addr::from_bits(Ipv4Addr::new(172, 30, 0, 0).to_bits() + nth * 1024);
        let subnet = types::VpcSubnet {
            custom_router_id: None,
            description: "made by the sandbox".to_owned(),
            id,
            ipv4_block: types::Ipv4Net::try_from(format!("{block}/22")).map_err(|_| Refusal::internal())?,
            ipv6_block: types::Ipv6Net::try_from(format!("fd00:{:x}::/64", self.subnets.len() + 1))
                .map_err(|_| Refusal::internal())?,
            name,
            time_created: now,
            time_modified: now,
            vpc_id: vpc,
        };
        self.subnets.insert(id, subnet);
        Ok(id)
    }

    pub(super) fn add_group(
        &mut self,
        project: Uuid,
        name: &str,
        policy: types::AffinityPolicy,
    ) -> Result<Uuid> {
        let (id, now, name) = (self.id(), self.now(), Self::name(name)?);
        let group = types::AntiAffinityGroup {
            description: "made by the sandbox".to_owned(),
            failure_domain: types::FailureDomain::Sled,
            id,
            name,
            policy,
            project_id: project,
            time_created: now,
            time_modified: now,
        };
        self.groups.insert(id, group);
        Ok(id)
    }

    pub(super) fn add_floating_ip(&mut self, project: Uuid, name: &str) -> Result<Uuid> {
        let (id, now, name) = (self.id(), self.now(), Self::name(name)?);
        let ip = self.external_ip();
        let floating = types::FloatingIp {
            description: "made by the sandbox".to_owned(),
            id,
            instance_id: None,
            ip,
            ip_pool_id: self.pool,
            name,
            project_id: project,
            time_created: now,
            time_modified: now,
        };
        self.floating_ips.insert(id, floating);
        Ok(id)
    }

    pub(super) fn vpc_named(&self, project: Uuid, name: &str) -> Option<Uuid> {
        self.vpcs
            .values()
            .find(|vpc| vpc.project_id == project && vpc.name.as_str() == name)
            .map(|vpc| vpc.id)
    }

    pub(super) fn subnet_named(&self, vpc: Uuid, name: &str) -> Option<Uuid> {
        self.subnets
            .values()
            .find(|subnet| subnet.vpc_id == vpc && subnet.name.as_str() == name)
            .map(|subnet| subnet.id)
    }
}

pub(super) fn ping(_: &mut Rack, _: &Ask) -> Result<Outcome> {
    Outcome::ok(&types::Ping {
        status: types::PingStatus::Ok,
    })
}

pub(super) fn current_user(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let (now, silo) = (rack.now(), rack.silo);
    Outcome::ok(&types::CurrentUser {
        display_name: ask.user.clone(),
        fleet_viewer: false,
        id: silo,
        silo_admin: false,
        silo_id: silo,
        silo_name: Rack::name("sandbox")?,
        time_created: now,
        time_modified: now,
    })
}

pub(super) fn utilization(rack: &mut Rack, _: &Ask) -> Result<Outcome> {
    let (cpus, memory) = rack.compute_used();
    let counts = |cpus: u64, memory, storage| types::VirtualResourceCounts {
        cpus: i64::try_from(cpus).unwrap_or(i64::MAX),
        memory: types::ByteCount(memory),
        storage: types::ByteCount(storage),
    };
    Outcome::ok(&types::Utilization {
        capacity: counts(rack.limits.vcpus, rack.limits.memory, rack.limits.storage),
        provisioned: counts(cpus, memory, rack.storage_used()),
    })
}

pub(super) fn project_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let seen = rack.projects.values().filter(|it| !ask.hidden.contains(&it.id));
    let all = seen;
    let (items, next_page) = Scan::of(ask)?.page(ask, rack.options.page, all, |it: &types::Project| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::ProjectResultsPage { items, next_page })
}

pub(super) fn project_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = rack.project(ask, &ask.target)?;
    Outcome::ok(rack.projects.get(&id).ok_or_else(Refusal::internal)?)
}

pub(super) fn project_create(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let body: types::ProjectCreate = ask.body()?;
    let id = rack.add_project(body.name, body.description)?;
    created(rack.projects.get(&id))
}

fn created<T: Serialize>(made: Option<&T>) -> Result<Outcome> {
    let reply = Reply::json(201, made.ok_or_else(Refusal::internal)?)?;
    Ok(Outcome::Ready(reply))
}

pub(super) fn vpc_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let project = rack.needed_project(ask, scan.project.as_deref())?;
    let vpcs = rack.vpcs.values().filter(|it| it.project_id == project);
    let (items, next_page) = scan.page(ask, rack.options.page, vpcs, |it: &types::Vpc| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::VpcResultsPage { items, next_page })
}

pub(super) fn vpc_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    Outcome::ok(rack.find(ask, &Kind::VPC, &rack.vpcs, &ask.target, ask.query("project"))?)
}

pub(super) fn subnet_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let wanted = scan
        .vpc
        .as_deref()
        .ok_or_else(|| Refusal::malformed("unable to parse query string: missing field `vpc`"))?;
    let vpc = rack
        .find(ask, &Kind::VPC, &rack.vpcs, wanted, scan.project.as_deref())?
        .id;
    let subnets = rack.subnets.values().filter(|it| it.vpc_id == vpc);
    let all = subnets;
    let (items, next_page) = scan.page(ask, rack.options.page, all, |it: &types::VpcSubnet| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::VpcSubnetResultsPage { items, next_page })
}

/// A subnet by ID alone, or by name with its VPC (and that one's project).
pub(super) fn subnet_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let pick = Pick::parse(&ask.target)?;
    let found = match (&pick, ask.query("vpc")) {
        (Pick::Id(id), None) => rack.subnets.get(id).filter(|subnet| {
            let vpc = rack.vpcs.get(&subnet.vpc_id);
            vpc.is_some_and(|vpc| !ask.hidden.contains(&vpc.project_id))
        }),
        (Pick::Id(_), Some(_)) => {
            return Err(Refusal::invalid(
                "when providing subnet as an ID VPC should not be specified",
            ));
        }
        (Pick::Name(_), None) => {
            return Err(Refusal::invalid(
                "subnet should either be an ID or VPC should be specified",
            ));
        }
        (Pick::Name(name), Some(vpc)) => {
            let vpc = rack
                .find(ask, &Kind::VPC, &rack.vpcs, vpc, ask.query("project"))?
                .id;
            rack.subnet_named(vpc, name)
                .and_then(|subnet| rack.subnets.get(&subnet))
        }
    };
    Outcome::ok(found.ok_or_else(|| Refusal::not_found("vpc-subnet", &pick))?)
}

pub(super) fn group_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let project = rack.needed_project(ask, scan.project.as_deref())?;
    let groups = rack.groups.values().filter(|it| it.project_id == project);
    let all = groups;
    let (items, next_page) = scan.page(ask, rack.options.page, all, |it: &types::AntiAffinityGroup| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::AntiAffinityGroupResultsPage { items, next_page })
}

pub(super) fn group_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let project = ask.query("project");
    Outcome::ok(rack.find(ask, &Kind::GROUP, &rack.groups, &ask.target, project)?)
}

pub(super) fn group_create(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let project = rack.needed_project(ask, ask.query("project"))?;
    let body: types::AntiAffinityGroupCreate = ask.body()?;
    let taken = |it: &types::AntiAffinityGroup| it.project_id == project && it.name == body.name;
    if rack.groups.values().any(taken) {
        return Err(Refusal::exists(Kind::GROUP.resource, body.name.as_str()));
    }
    let id = rack.add_group(project, body.name.as_str(), body.policy)?;
    if let Some(group) = rack.groups.get_mut(&id) {
        group.description = body.description;
    }
    rack.touch();
    created(rack.groups.get(&id))
}

pub(super) fn floating_ip_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let project = rack.needed_project(ask, scan.project.as_deref())?;
    let floating = rack.floating_ips.values().filter(|it| it.project_id == project);
    let all = floating;
    let (items, next_page) = scan.page(ask, rack.options.page, all, |it: &types::FloatingIp| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::FloatingIpResultsPage { items, next_page })
}

pub(super) fn floating_ip_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let project = ask.query("project");
    Outcome::ok(rack.find(ask, &Kind::FLOATING_IP, &rack.floating_ips, &ask.target, project)?)
}
