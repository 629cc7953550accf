//! Decides what may be done with instances once they are made, and moves them from state to state.
//!
//! Rules and wording are nexus's: `app/instance.rs` (the states that allow start, stop and reboot),
//! `db/datastore/instance.rs` (delete needs a stopped or failed one, disks stay behind, detached),
//! `sagas/instance_start.rs` (the sled first, then the quota).

use std::collections::BTreeSet;

use oxide::types;
use oxide::types::InstanceState as State;
use uuid::Uuid;

use super::answer::{Ask, Outcome, Refusal, Reply, Result, Scan};
use super::disks::{GIB, belongs_to};
use super::rack::{Due, Instance, Kind, Rack};

use super::Happening;

// Nexus's constants (`app/mod.rs`).
const MAX_VCPUS: u16 = 254;
const MAX_MEMORY: u64 = 1536 * GIB;

/// What propolis answers at most where the caller names no length (`serial/history_buffer.rs`, `DEFAULT_MAX_LENGTH`).
const CONSOLE_LENGTH: usize = 16 * 1024;

impl Rack {
    pub(super) fn instance_named(&self, project: Uuid, name: &str) -> Option<Uuid> {
        self.instances
            .values()
            .find(|it| it.view.project_id == project && it.view.name.as_str() == name)
            .map(|it| it.view.id)
    }

    /// Moves an instance on, so that whatever was planned for its former state is void. Returns its new turn.
    fn turn(&mut self, id: Uuid, state: State) -> u64 {
        let now = self.now();
        let Some(it) = self.instances.get_mut(&id) else {
            return 0;
        };
        it.turn += 1;
        it.view.run_state = state;
        it.view.time_run_state_updated = now;
        if matches!(state, State::Stopped | State::Failed) {
            it.sled = None;
        }
        let turn = it.turn;
        self.touch();
        turn
    }

    fn still(&self, id: Uuid, turn: u64) -> bool {
        self.instances.get(&id).is_some_and(|it| it.turn == turn)
    }

    pub(super) fn instance_created(&mut self, id: Uuid, turn: u64, start: bool) {
        if !self.still(id, turn) {
            return;
        }
        for disk in self.disks.values_mut() {
            if belongs_to(&disk.view, id) {
                disk.view.state = types::DiskState::Attached(id);
            }
        }
        self.turn(id, State::Stopped);
        if start {
            // As nexus does: the error goes to a log that no client sees.
            let _ = self.start_instance(id);
        }
    }

    pub(super) fn instance_running(&mut self, id: Uuid, turn: u64) {
        if self.still(id, turn) {
            let turn = self.turn(id, State::Running);
            self.plan(self.pace.boot, Due::Booted { id, turn });
        }
    }

    pub(super) fn instance_booted(&mut self, id: Uuid, turn: u64) {
        if let Some(it) = self.instances.get(&id).filter(|it| it.turn == turn) {
            let happening = Happening::Booted {
                id,
                user_data: it.user_data.clone(),
            };
            self.tell(&happening);
        }
    }

    pub(super) fn instance_stopped(&mut self, id: Uuid, turn: u64) {
        if self.still(id, turn) {
            self.turn(id, State::Stopped);
            self.tell(&Happening::Stopped { id });
        }
    }

    pub(super) fn instance_restarts(&mut self, id: Uuid, turn: u64) {
        if self.still(id, turn) && self.start_instance(id).is_ok() {
            let now = self.now();
            if let Some(it) = self.instances.get_mut(&id) {
                it.view.time_last_auto_restarted = Some(now);
            }
        }
    }

    /// Starts an instance, if a sled and the quota have room.
    pub(super) fn start_instance(&mut self, id: Uuid) -> Result<()> {
        let state = self
            .instances
            .get(&id)
            .ok_or_else(Refusal::internal)?
            .view
            .run_state;
        match state {
            State::Starting | State::Running | State::Rebooting | State::Migrating => return Ok(()),
            State::Stopped | State::Failed => {}
            State::Stopping => {
                return Err(Refusal::conflict(
                    "instance must finish stopping before it can be started",
                ));
            }
            other => {
                return Err(Refusal::conflict(format!(
                    "instance is in state {other} but it must be stopped to be started"
                )));
            }
        }
        let sled = self.place(id)?;
        self.check_compute(id)?;
        let turn = self.turn(id, State::Starting);
        if let Some(it) = self.instances.get_mut(&id) {
            it.sled = Some(sled);
            // What the firmware says first.
            it.console = b"BdsDxe: loading Boot0001 from the boot disk\r\n".to_vec();
        }
        self.plan(self.pace.start, Due::Running { id, turn });
        Ok(())
    }

    /// Stops an instance, as the rack does when told to. What nexus refuses to stop is refused.
    pub(super) fn stop_instance(&mut self, id: Uuid) -> Result<()> {
        let state = self
            .instances
            .get(&id)
            .ok_or_else(Refusal::internal)?
            .view
            .run_state;
        match state {
            State::Stopped | State::Stopping => Ok(()),
            State::Creating => Err(Refusal::invalid(
                "cannot change instance state while it is still being created",
            )),
            State::Failed => {
                self.turn(id, State::Stopped);
                Ok(())
            }
            State::Repairing | State::Destroyed => Err(Refusal::invalid(format!(
                "instance state cannot be changed from state \"{state}\""
            ))),
            State::Starting | State::Running | State::Rebooting | State::Migrating => {
                let turn = self.turn(id, State::Stopping);
                self.plan(self.pace.stop, Due::Stopped { id, turn });
                Ok(())
            }
        }
    }

    /// What a crashed VMM looks like: `failed`, and restarted after a while unless the policy says never.
    pub(super) fn fail_instance(&mut self, id: Uuid) {
        let turn = self.turn(id, State::Failed);
        self.tell(&Happening::Stopped { id });
        let never = self
            .instances
            .get(&id)
            .is_some_and(|it| it.view.auto_restart_policy == Some(types::InstanceAutoRestartPolicy::Never));
        if let Some(cooldown) = self.pace.auto_restart.filter(|_| !never) {
            self.plan(cooldown, Due::AutoRestart { id, turn });
        }
    }

    /// Takes an instance away. Its interfaces and addresses go with it, its disks stay behind, detached.
    pub(super) fn remove_instance(&mut self, id: Uuid) {
        if self.instances.remove(&id).is_none() {
            return;
        }
        let now = self.now();
        for disk in self.disks.values_mut() {
            if belongs_to(&disk.view, id) {
                disk.view.state = types::DiskState::Detached;
                disk.view.time_modified = now;
            }
        }
        for floating in self.floating_ips.values_mut() {
            if floating.instance_id == Some(id) {
                floating.instance_id = None;
            }
        }
        self.tell(&Happening::Gone { id });
        self.touch();
    }
}

impl Rack {
    /// A running instance that nobody asked the API for.
    pub(super) fn plant_instance(&mut self, project: Uuid, name: &str, description: &str) -> Result<Uuid> {
        let name = Self::name(name)?;
        if self.instance_named(project, name.as_str()).is_some() {
            return Err(Refusal::exists(Kind::INSTANCE.resource, name.as_str()));
        }
        let (id, now) = (self.id(), self.now());
        let view = types::Instance {
            auto_restart_cooldown_expiration: None,
            auto_restart_enabled: false,
            auto_restart_policy: Some(types::InstanceAutoRestartPolicy::Never),
            boot_disk_id: None,
            cpu_platform: None,
            description: description.to_owned(),
            enable_jumbo_frames: false,
            hostname: name.to_string(),
            id,
            memory: types::ByteCount(GIB),
            name,
            ncpus: types::InstanceCpuCount(1),
            project_id: project,
            run_state: State::Running,
            time_created: now,
            time_last_auto_restarted: None,
            time_modified: now,
            time_run_state_updated: now,
        };
        let instance = Instance {
            view,
            turn: 0,
            sled: Some(0),
            user_data: Vec::new(),
            console: Vec::new(),
            nics: Vec::new(),
            ips: Vec::new(),
            groups: BTreeSet::new(),
            asked: None,
        };
        self.instances.insert(id, instance);
        Ok(id)
    }
}

fn instance_of<'a>(rack: &'a Rack, ask: &Ask) -> Result<&'a Instance> {
    let id = rack.instance(ask, &ask.target, ask.query("project"))?;
    rack.instances.get(&id).ok_or_else(Refusal::internal)
}

pub(super) fn list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let project = rack.needed_project(ask, scan.project.as_deref())?;
    let instances = rack.instances.values().map(|it| &it.view);
    let all = instances.filter(|it| it.project_id == project);
    let (items, next_page) = scan.page(ask, rack.options.page, all, |it: &types::Instance| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::InstanceResultsPage { items, next_page })
}

pub(super) fn view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    Outcome::ok(&instance_of(rack, ask)?.view)
}

pub(super) fn disk_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let id = rack.instance(ask, &ask.target, scan.project.as_deref())?;
    let disks = rack.disks.values().map(|disk| &disk.view);
    let all = disks.filter(|disk| belongs_to(disk, id));
    let (items, next_page) = scan.page(ask, rack.options.page, all, |disk: &types::Disk| {
        (disk.name.to_string(), disk.id)
    })?;
    Outcome::ok(&types::DiskResultsPage { items, next_page })
}

pub(super) fn nic_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let wanted = scan
        .instance
        .as_deref()
        .ok_or_else(|| Refusal::malformed("unable to parse query string: missing field `instance`"))?;
    let id = rack.instance(ask, wanted, scan.project.as_deref())?;
    let all = rack.instances.get(&id).into_iter().flat_map(|it| &it.nics);
    let (items, next_page) = scan.page(
        ask,
        rack.options.page,
        all,
        |nic: &types::InstanceNetworkInterface| (nic.name.to_string(), nic.id),
    )?;
    Outcome::ok(&types::InstanceNetworkInterfaceResultsPage { items, next_page })
}

pub(super) fn external_ip_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    // The one list of the API that never has a second page.
    Outcome::ok(&types::ExternalIpResultsPage {
        items: instance_of(rack, ask)?.ips.clone(),
        next_page: None,
    })
}

/// A range of what an instance wrote to its serial console, as nexus passes it on from propolis
/// (`app/instance.rs`: the states; `propolis-server/src/lib/serial/history_buffer.rs`: the range). The console is kept whole here;
/// propolis keeps its beginning and its end.
pub(super) fn serial_console(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let it = instance_of(rack, ask)?;
    let state = it.view.run_state;
    match state {
        State::Running | State::Rebooting | State::Migrating => {}
        State::Starting | State::Stopping => {
            return Err(Refusal::invalid(format!(
                "cannot connect to serial console of instance in state \"{state}\""
            )));
        }
        State::Creating | State::Stopped | State::Failed | State::Repairing | State::Destroyed => {
            return Err(Refusal::invalid(format!(
                "instance is {state} and has no active serial console server"
            )));
        }
    }
    let number = |key: &str| {
        let value = ask.query(key).map(str::parse::<usize>).transpose();
        value.map_err(|_| {
            Refusal::malformed(format!(
                "unable to parse query string: {key}: invalid digit found in string"
            ))
        })
    };
    let whole = it.console.len();
    let from = match (number("from_start")?, number("most_recent")?) {
        (Some(from), None) => from.min(whole),
        (None, Some(back)) => whole.saturating_sub(back),
        // What propolis refuses, nexus reports as its own failure.
        _ => return Err(Refusal::internal()),
    };
    let most = number("max_bytes")?.unwrap_or(CONSOLE_LENGTH);
    let data: Vec<u8> = it.console.iter().skip(from).take(most).copied().collect();
    let end = from.saturating_add(data.len());
    Outcome::ok(&types::InstanceSerialConsoleData {
        data,
        last_byte_offset: u64::try_from(end).unwrap_or(u64::MAX),
    })
}

pub(super) fn start(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = instance_of(rack, ask)?.view.id;
    rack.start_instance(id)?;
    Outcome::accepted(&rack.instances.get(&id).ok_or_else(Refusal::internal)?.view)
}

pub(super) fn stop(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = instance_of(rack, ask)?.view.id;
    rack.stop_instance(id)?;
    Outcome::accepted(&rack.instances.get(&id).ok_or_else(Refusal::internal)?.view)
}

pub(super) fn reboot(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let (id, state) = {
        let it = instance_of(rack, ask)?;
        (it.view.id, it.view.run_state)
    };
    match state {
        State::Creating => {
            return Err(Refusal::invalid(
                "cannot change instance state while it is still being created",
            ));
        }
        State::Stopped => {
            return Err(Refusal::invalid(
                "cannot reboot an instance in state stopped with no VMM",
            ));
        }
        State::Failed | State::Destroyed => {
            return Err(Refusal::invalid(format!(
                "instance state cannot be changed from {state}"
            )));
        }
        State::Repairing => {
            return Err(Refusal::invalid(
                "instance state cannot be changed from state \"repairing\"",
            ));
        }
        // The sled takes the order, and a VMM on its way up or down does nothing about it.
        State::Starting | State::Stopping | State::Migrating | State::Rebooting => {}
        State::Running => {
            let turn = rack.turn(id, State::Rebooting);
            rack.plan(rack.pace.reboot, Due::Running { id, turn });
        }
    }
    Outcome::accepted(&rack.instances.get(&id).ok_or_else(Refusal::internal)?.view)
}

pub(super) fn delete(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let (id, state) = {
        let it = instance_of(rack, ask)?;
        (it.view.id, it.view.run_state)
    };
    match state {
        State::Stopped | State::Failed => {}
        State::Creating => {
            return Err(Refusal::invalid(
                "instance cannot be deleted in state \"creating\"",
            ));
        }
        _ => {
            return Err(Refusal::invalid(
                "cannot delete instance: instance is running or has not yet fully stopped",
            ));
        }
    }
    rack.remove_instance(id);
    Ok(Outcome::After(rack.pace.delete, Reply::empty()))
}

pub(super) fn update(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = instance_of(rack, ask)?.view.id;
    let body: types::InstanceUpdate = ask.body()?;
    check_size(body.ncpus.0, body.memory.0)?;
    if body.enable_jumbo_frames && !rack.limits.jumbo_frames {
        return Err(Refusal::invalid(
            "enable_jumbo_frames may only be set to true when the fleet-wide jumbo-frames opt-in is enabled \
             by a fleet administrator",
        ));
    }
    let it = rack.instances.get(&id).ok_or_else(Refusal::internal)?;
    let boot_disk = match &body.boot_disk {
        None => None,
        Some(wanted) => {
            let within = matches!(wanted, types::NameOrId::Name(_)).then(|| it.view.project_id.to_string());
            let disk = rack.find(
                ask,
                &Kind::DISK,
                &rack.disks,
                &wanted.to_string(),
                within.as_deref(),
            )?;
            if !belongs_to(&disk.view, id) {
                return Err(Refusal::conflict("boot disk must be attached"));
            }
            Some(disk.view.id)
        }
    };
    let stopped = matches!(
        it.view.run_state,
        State::Stopped | State::Failed | State::Creating
    );
    if !stopped && boot_disk != it.view.boot_disk_id {
        return Err(Refusal::conflict("instance must be stopped to set boot disk"));
    }
    let resized = (body.ncpus.0, body.memory.0) != (it.view.ncpus.0, it.view.memory.0);
    if !stopped && (resized || body.cpu_platform != it.view.cpu_platform) {
        return Err(Refusal::conflict(
            "instance must be stopped to change CPU or memory",
        ));
    }
    let now = rack.now();
    let it = rack.instances.get_mut(&id).ok_or_else(Refusal::internal)?;
    it.view.ncpus = body.ncpus;
    it.view.memory = body.memory;
    it.view.cpu_platform = body.cpu_platform;
    it.view.boot_disk_id = boot_disk;
    it.view.auto_restart_policy = body.auto_restart_policy;
    it.view.enable_jumbo_frames = body.enable_jumbo_frames;
    it.view.time_modified = now;
    let outcome = Outcome::ok(&it.view);
    rack.touch();
    outcome
}

pub(super) fn check_size(ncpus: u16, memory: u64) -> Result<()> {
    if ncpus > MAX_VCPUS {
        return Err(Refusal::invalid(format!(
            "cannot have more than {MAX_VCPUS} vCPUs per instance"
        )));
    }
    if memory < GIB {
        return Err(Refusal::value("size", "memory must be at least 1 GiB"));
    }
    if !memory.is_multiple_of(GIB) {
        return Err(Refusal::value("size", "memory must be divisible by 1 GiB"));
    }
    if memory > MAX_MEMORY {
        return Err(Refusal::value(
            "size",
            "memory must be less than or equal to 1536 GiB",
        ));
    }
    Ok(())
}
