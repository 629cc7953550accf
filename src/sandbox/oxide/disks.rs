//! Decides what may be done with disks, and when; above all how bytes are imported.
//!
//! Rules and wording are nexus's: `app/disk.rs` (sizes, the states of an import), `sagas/finalize_disk.rs` (the
//! disk stays, detached), `sagas/disk_delete.rs` (only detached or faulted); the size of a chunk is crucible's
//! pantry's.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oxide::types;
use uuid::Uuid;

use super::answer::{Ask, Outcome, Refusal, Reply, Result, Scan};
use super::content::Content;
use super::images::{visible_image, visible_snapshot};
use super::rack::{Disk, Due, Kind, Rack};

pub(super) const GIB: u64 = 1 << 30;
/// A distributed disk's largest size (`MAX_DISK_SIZE_BYTES`).
const LARGEST_DISK: u64 = 1023 * GIB;
/// The most that crucible's pantry takes in one write (`MAX_CHUNK_SIZE`).
const LARGEST_CHUNK: usize = 512 * 1024;
/// Local disks have no other block size.
const LOCAL_BLOCK: i64 = 4096;

/// A disk that passed every check and only has to be written down.
pub(super) struct NewDisk {
    name: types::Name,
    description: String,
    size: types::ByteCount,
    block_size: types::BlockSize,
    source: Source,
}

enum Source {
    Blank,
    Local,
    Importing,
    Snapshot(Uuid, bool, Arc<Content>),
    Image(Uuid, bool, Arc<Content>),
}

impl NewDisk {
    pub(super) fn name(&self) -> &str {
        self.name.as_str()
    }

    /// What it takes of the storage quota; local disks are no part of it.
    pub(super) fn quota(&self) -> u64 {
        match self.source {
            Source::Local => 0,
            _ => self.size.0,
        }
    }
}

/// The checks of `validate_disk_create_params`, in nexus's order.
pub(super) fn check_disk(rack: &Rack, ask: &Ask, project: Uuid, disk: types::DiskCreate) -> Result<NewDisk> {
    let size = disk.size.0;
    let (block_size, source) = match disk.disk_backend {
        types::DiskBackend::Local => (
            types::BlockSize::try_from(LOCAL_BLOCK).map_err(|_| Refusal::internal())?,
            Source::Local,
        ),
        types::DiskBackend::Distributed(types::DiskSource::Blank { block_size }) => {
            (block_size, Source::Blank)
        }
        types::DiskBackend::Distributed(types::DiskSource::ImportingBlocks { block_size }) => {
            (block_size, Source::Importing)
        }
        types::DiskBackend::Distributed(types::DiskSource::Snapshot {
            read_only,
            snapshot_id,
        }) => {
            let snapshot = visible_snapshot(rack, ask, snapshot_id)?;
            if snapshot.view.project_id != project {
                return Err(Refusal::invalid("snapshot does not belong to this project"));
            }
            check_source_size("snapshot", snapshot.view.size.0, size, read_only)?;
            let source = Source::Snapshot(snapshot_id, read_only, snapshot.content.clone());
            (snapshot.block_size.clone(), source)
        }
        types::DiskBackend::Distributed(types::DiskSource::Image { image_id, read_only }) => {
            let image = visible_image(rack, ask, image_id)?;
            if image.view.project_id.is_some_and(|owner| owner != project) {
                return Err(Refusal::invalid("image does not belong to this project"));
            }
            check_source_size("image", image.view.size.0, size, read_only)?;
            let source = Source::Image(image_id, read_only, image.content.clone());
            (image.view.block_size.clone(), source)
        }
    };
    let block = u64::try_from(*block_size).unwrap_or(1).max(1);
    if !size.is_multiple_of(block) {
        return Err(Refusal::value(
            "size and block_size",
            format!("total size must be a multiple of block size {block}"),
        ));
    }
    if size < GIB {
        return Err(Refusal::value("size", "total size must be at least 1 GiB"));
    }
    if !size.is_multiple_of(GIB) {
        return Err(Refusal::value("size", "total size must be a multiple of 1 GiB"));
    }
    if matches!(source, Source::Local) {
        if rack.limits.sleds.iter().all(|sled| sled.local_storage < size) {
            return Err(Refusal::value(
                "size",
                "requested size is too large to fit on any physical disk",
            ));
        }
    } else if size > LARGEST_DISK {
        return Err(Refusal::value("size", "total size must be less than 1023 GiB"));
    }
    Ok(NewDisk {
        name: disk.name,
        description: disk.description,
        size: disk.size,
        block_size,
        source,
    })
}

fn check_source_size(kind: &str, source: u64, size: u64, read_only: bool) -> Result<()> {
    if read_only && source != size {
        return Err(Refusal::invalid(format!(
            "read-only disk size {size} must be equal to source {kind} size {source}"
        )));
    }
    if source > size {
        return Err(Refusal::invalid(format!(
            "disk size {size} must be greater than or equal to {kind} size {source}"
        )));
    }
    Ok(())
}

impl Rack {
    pub(super) fn disk_named(&self, project: Uuid, name: &str) -> Option<Uuid> {
        self.disks
            .values()
            .find(|disk| disk.view.project_id == project && disk.view.name.as_str() == name)
            .map(|disk| disk.view.id)
    }

    /// What disks and snapshots take of the storage quota.
    pub(super) fn storage_used(&self) -> u64 {
        let disks = self
            .disks
            .values()
            .filter(|disk| disk.view.disk_type == types::DiskType::Distributed)
            .map(|disk| disk.view.size.0);
        let snapshots = self.snapshots.values().map(|snapshot| snapshot.view.size.0);
        disks.chain(snapshots).sum()
    }

    /// Refuses what would go over the storage quota.
    pub(super) fn check_storage(&self, more: u64) -> Result<()> {
        if self.storage_used().saturating_add(more) <= self.limits.storage {
            return Ok(());
        }
        Err(Refusal::capacity(
            "Storage Limit Exceeded: Not enough storage to complete request. Either remove unneeded disks \
             and snapshots to free up resources or contact the rack operator to request a capacity increase.",
        ))
    }

    /// Writes a disk down as being created and returns its ID and what it becomes.
    pub(super) fn add_disk(&mut self, project: Uuid, disk: NewDisk) -> (Uuid, types::DiskState) {
        let (id, now) = (self.id(), self.now());
        let budget = self.options.kept_bytes;
        let (mut snapshot_id, mut image_id, mut read_only) = (None, None, false);
        let mut disk_type = types::DiskType::Distributed;
        let mut becomes = types::DiskState::Detached;
        let content = match disk.source {
            Source::Blank => Content::new(budget),
            Source::Local => {
                disk_type = types::DiskType::Local;
                Content::new(budget)
            }
            Source::Importing => {
                becomes = types::DiskState::ImportReady;
                Content::new(budget)
            }
            Source::Snapshot(id, fixed, content) => {
                (snapshot_id, read_only) = (Some(id), fixed);
                content.as_ref().clone()
            }
            Source::Image(id, fixed, content) => {
                (image_id, read_only) = (Some(id), fixed);
                content.as_ref().clone()
            }
        };
        let view = types::Disk {
            block_size: disk.block_size,
            description: disk.description,
            device_path: format!("/mnt/{}", disk.name.as_str()),
            disk_type,
            id,
            image_id,
            name: disk.name,
            project_id: project,
            read_only,
            size: disk.size,
            snapshot_id,
            state: types::DiskState::Creating,
            time_created: now,
            time_modified: now,
        };
        self.disks.insert(id, Disk { view, content });
        (id, becomes)
    }

    pub(super) fn disk_ready(&mut self, id: Uuid, state: types::DiskState) {
        let now = self.now();
        if let Some(disk) = self.disks.get_mut(&id)
            && matches!(disk.view.state, types::DiskState::Creating)
        {
            disk.view.state = state;
            disk.view.time_modified = now;
        }
    }

    pub(super) fn finalized(&mut self, disk: Uuid, snapshot: Option<Uuid>) {
        let now = self.now();
        if let Some(disk) = self.disks.get_mut(&disk)
            && matches!(disk.view.state, types::DiskState::Finalizing)
        {
            disk.view.state = types::DiskState::Detached;
            disk.view.time_modified = now;
        }
        if let Some(snapshot) = snapshot.and_then(|id| self.snapshots.get_mut(&id)) {
            snapshot.view.state = types::SnapshotState::Ready;
            snapshot.view.time_modified = now;
        }
    }

    /// A detached disk of 2 GiB that nobody asked the API for.
    pub(super) fn plant_disk(&mut self, project: Uuid, name: &str, description: &str) -> Result<Uuid> {
        let name = Self::name(name)?;
        if self.disk_named(project, name.as_str()).is_some() {
            return Err(Refusal::exists(Kind::DISK.resource, name.as_str()));
        }
        let disk = NewDisk {
            name,
            description: description.to_owned(),
            size: types::ByteCount(2 * GIB),
            block_size: types::BlockSize::try_from(512).map_err(|_| Refusal::internal())?,
            source: Source::Blank,
        };
        let (id, state) = self.add_disk(project, disk);
        self.disk_ready(id, state);
        Ok(id)
    }
}

fn disk(rack: &Rack, ask: &Ask) -> Result<Uuid> {
    rack.find(ask, &Kind::DISK, &rack.disks, &ask.target, ask.query("project"))
        .map(|disk| disk.view.id)
}

fn disk_mut<'a>(rack: &'a mut Rack, ask: &Ask) -> Result<&'a mut Disk> {
    let id = disk(rack, ask)?;
    let now = rack.now();
    let disk = rack.disks.get_mut(&id).ok_or_else(Refusal::internal)?;
    disk.view.time_modified = now;
    Ok(disk)
}

pub(super) fn disk_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let project = rack.needed_project(ask, scan.project.as_deref())?;
    let disks = rack.disks.values().map(|disk| &disk.view);
    let all = disks.filter(|disk| disk.project_id == project);
    let (items, next_page) = scan.page(ask, rack.options.page, all, |disk: &types::Disk| {
        (disk.name.to_string(), disk.id)
    })?;
    Outcome::ok(&types::DiskResultsPage { items, next_page })
}

pub(super) fn disk_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = disk(rack, ask)?;
    Outcome::ok(&rack.disks.get(&id).ok_or_else(Refusal::internal)?.view)
}

pub(super) fn disk_create(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let project = rack.needed_project(ask, ask.query("project"))?;
    let disk = check_disk(rack, ask, project, ask.body()?)?;
    if rack.disk_named(project, disk.name()).is_some() {
        return Err(Refusal::exists(Kind::DISK.resource, disk.name()));
    }
    rack.check_storage(disk.quota())?;
    let (id, state) = rack.add_disk(project, disk);
    rack.plan(rack.pace.disk_create, Due::DiskReady { id, state });
    Ok(Outcome::when(move |rack| match rack.disks.get(&id) {
        None => Some(Err(Refusal::internal())),
        Some(disk) if matches!(disk.view.state, types::DiskState::Creating) => None,
        Some(disk) => Some(Reply::json(201, &disk.view)),
    }))
}

pub(super) fn disk_delete(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = disk(rack, ask)?;
    let state = rack
        .disks
        .get(&id)
        .ok_or_else(Refusal::internal)?
        .view
        .state
        .clone();
    if !matches!(state, types::DiskState::Detached | types::DiskState::Faulted) {
        return Err(Refusal::invalid(format!(
            "disk cannot be deleted in state \"{}\"",
            label(&state)
        )));
    }
    rack.disks.remove(&id);
    rack.touch();
    Ok(Outcome::After(rack.pace.disk_delete, Reply::empty()))
}

pub(super) fn bulk_write_start(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    import_step(
        rack,
        ask,
        types::DiskState::ImportReady,
        types::DiskState::ImportingFromBulkWrites,
    )
}

pub(super) fn bulk_write_stop(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    import_step(
        rack,
        ask,
        types::DiskState::ImportingFromBulkWrites,
        types::DiskState::ImportReady,
    )
}

fn import_step(rack: &mut Rack, ask: &Ask, from: types::DiskState, to: types::DiskState) -> Result<Outcome> {
    let disk = disk_mut(rack, ask)?;
    refuse_local(disk)?;
    if label(&disk.view.state) != label(&from) {
        return Err(Refusal::invalid(format!(
            "cannot set disk in state {:?} to {:?}",
            disk.view.state,
            label(&to)
        )));
    }
    disk.view.state = to;
    rack.touch();
    Ok(Outcome::Ready(Reply::empty()))
}

/// Nexus answers with a plain 500 here: the caller asked for something that no disk of the kind can do.
fn refuse_local(disk: &Disk) -> Result<()> {
    match disk.view.disk_type {
        types::DiskType::Local => Err(Refusal::internal()),
        types::DiskType::Distributed => Ok(()),
    }
}

pub(super) fn bulk_write(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let body: types::ImportBlocksBulkWrite = ask.body()?;
    let disk = disk_mut(rack, ask)?;
    refuse_local(disk)?;
    if !matches!(disk.view.state, types::DiskState::ImportingFromBulkWrites) {
        return Err(Refusal::invalid(format!(
            "cannot import blocks with a bulk write for disk in state {:?}",
            disk.view.state
        )));
    }
    let bytes = STANDARD
        .decode(&body.base64_encoded_data)
        .map_err(|e| Refusal::invalid(format!("error base64 decoding data: {e}")))?;
    if bytes.len() > LARGEST_CHUNK {
        return Err(Refusal::invalid(format!(
            "data len {} over maximum chunk size {LARGEST_CHUNK}",
            bytes.len()
        )));
    }
    let block = u64::try_from(*disk.view.block_size).unwrap_or(1).max(1);
    let length = bytes.len() as u64;
    if !body.offset.is_multiple_of(block) || !length.is_multiple_of(block) {
        return Err(Refusal::invalid(format!(
            "offset {} and data len {length} must be multiples of block size {block}",
            body.offset
        )));
    }
    if body.offset.saturating_add(length) > disk.view.size.0 {
        return Err(Refusal::invalid(format!(
            "offset {} and data len {length} reach beyond the disk's end {}",
            body.offset, disk.view.size.0
        )));
    }
    disk.content.write(body.offset, &bytes);
    Ok(Outcome::After(rack.pace.chunk, Reply::empty()))
}

pub(super) fn finalize(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let body: types::FinalizeDisk = ask.body()?;
    let id = disk(rack, ask)?;
    let disk = rack.disks.get(&id).ok_or_else(Refusal::internal)?;
    refuse_local(disk)?;
    if !matches!(disk.view.state, types::DiskState::ImportReady) {
        return Err(Refusal::invalid(format!(
            "cannot finalize disk in state {:?}",
            disk.view.state
        )));
    }
    let (project, size) = (disk.view.project_id, disk.view.size.0);
    let snapshot = match body.snapshot_name {
        None => None,
        Some(name) => {
            // The saga unwinds: the disk is back where it was.
            if rack.snapshot_named(project, name.as_str()).is_some() {
                return Err(Refusal::exists(Kind::SNAPSHOT.resource, name.as_str()));
            }
            rack.check_storage(size)?;
            Some(rack.add_snapshot(name, format!("snapshot of finalized disk {id}"), id)?)
        }
    };
    let now = rack.now();
    let disk = rack.disks.get_mut(&id).ok_or_else(Refusal::internal)?;
    disk.view.state = types::DiskState::Finalizing;
    disk.view.time_modified = now;
    rack.touch();
    rack.plan(rack.pace.finalize, Due::Finalized { disk: id, snapshot });
    Ok(Outcome::when(move |rack| match rack.disks.get(&id) {
        Some(disk) if matches!(disk.view.state, types::DiskState::Finalizing) => None,
        _ => Some(Ok(Reply::empty())),
    }))
}

/// Whether a disk is an instance's, or about to be.
pub(super) fn belongs_to(disk: &types::Disk, instance: Uuid) -> bool {
    matches!(
        disk.state,
        types::DiskState::Attached(id) | types::DiskState::Attaching(id) if id == instance
    )
}

/// The state as the wire spells it, without the instance.
fn label(state: &types::DiskState) -> &'static str {
    match state {
        types::DiskState::Creating => "creating",
        types::DiskState::Detached => "detached",
        types::DiskState::ImportReady => "import_ready",
        types::DiskState::ImportingFromUrl => "importing_from_url",
        types::DiskState::ImportingFromBulkWrites => "importing_from_bulk_writes",
        types::DiskState::Finalizing => "finalizing",
        types::DiskState::Maintenance => "maintenance",
        types::DiskState::Attaching(_) => "attaching",
        types::DiskState::Attached(_) => "attached",
        types::DiskState::Detaching(_) => "detaching",
        types::DiskState::Destroyed => "destroyed",
        types::DiskState::Faulted => "faulted",
    }
}
