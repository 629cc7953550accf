//! Answers for snapshots, and for the images that are made of them.
//!
//! Rules and wording are nexus's: `app/snapshot.rs`, `db/datastore/snapshot.rs` (deleted when ready or faulted
//! alone), `app/image.rs` (a name without a project is the silo's).

use std::sync::Arc;

use oxide::types;
use uuid::Uuid;

use super::answer::{Ask, Outcome, Pick, Refusal, Reply, Result, Scan};
use super::content::Content;
use super::disks::GIB;
use super::rack::{Due, Image, Kind, Rack, Snapshot};

pub(super) fn visible_snapshot<'a>(rack: &'a Rack, ask: &Ask, id: Uuid) -> Result<&'a Snapshot> {
    rack.snapshots
        .get(&id)
        .filter(|snapshot| !ask.hidden.contains(&snapshot.view.project_id))
        .ok_or_else(|| Refusal::not_found("snapshot", &Pick::Id(id)))
}

pub(super) fn visible_image<'a>(rack: &'a Rack, ask: &Ask, id: Uuid) -> Result<&'a Image> {
    rack.images
        .get(&id)
        .filter(|image| {
            image
                .view
                .project_id
                .is_none_or(|project| !ask.hidden.contains(&project))
        })
        .ok_or_else(|| Refusal::not_found("image", &Pick::Id(id)))
}

impl Rack {
    pub(super) fn snapshot_named(&self, project: Uuid, name: &str) -> Option<Uuid> {
        self.snapshots
            .values()
            .find(|snapshot| snapshot.view.project_id == project && snapshot.view.name.as_str() == name)
            .map(|snapshot| snapshot.view.id)
    }

    pub(super) fn image_named(&self, project: Option<Uuid>, name: &str) -> Option<Uuid> {
        self.images
            .values()
            .find(|image| image.view.project_id == project && image.view.name.as_str() == name)
            .map(|image| image.view.id)
    }

    pub(super) fn add_snapshot(
        &mut self,
        name: types::Name,
        description: String,
        disk: Uuid,
    ) -> Result<Uuid> {
        let (id, now) = (self.id(), self.now());
        let disk = self.disks.get(&disk).ok_or_else(Refusal::internal)?;
        let view = types::Snapshot {
            description,
            disk_id: disk.view.id,
            id,
            name,
            project_id: disk.view.project_id,
            size: disk.view.size.clone(),
            state: types::SnapshotState::Creating,
            time_created: now,
            time_modified: now,
        };
        let snapshot = Snapshot {
            view,
            block_size: disk.view.block_size.clone(),
            content: Arc::new(disk.content.clone()),
        };
        self.snapshots.insert(id, snapshot);
        Ok(id)
    }

    /// An empty image that nobody asked the API for.
    pub(super) fn plant_image(&mut self, project: Uuid, name: &str, description: &str) -> Result<Uuid> {
        let name = Self::name(name)?;
        if self.image_named(Some(project), name.as_str()).is_some() {
            return Err(Refusal::exists("project-image", name.as_str()));
        }
        let (id, now) = (self.id(), self.now());
        let view = types::Image {
            block_size: types::BlockSize::try_from(512).map_err(|_| Refusal::internal())?,
            description: description.to_owned(),
            digest: None,
            id,
            name,
            os: "planted".to_owned(),
            project_id: Some(project),
            size: types::ByteCount(2 * GIB),
            time_created: now,
            time_modified: now,
            version: "planted".to_owned(),
        };
        let content = Arc::new(Content::new(self.options.kept_bytes));
        self.images.insert(id, Image { view, content });
        Ok(id)
    }
}

fn snapshot(rack: &Rack, ask: &Ask) -> Result<Uuid> {
    rack.find(
        ask,
        &Kind::SNAPSHOT,
        &rack.snapshots,
        &ask.target,
        ask.query("project"),
    )
    .map(|snapshot| snapshot.view.id)
}

pub(super) fn snapshot_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let project = rack.needed_project(ask, scan.project.as_deref())?;
    let snapshots = rack.snapshots.values().map(|snapshot| &snapshot.view);
    let all = snapshots.filter(|it| it.project_id == project);
    let (items, next_page) = scan.page(ask, rack.options.page, all, |it: &types::Snapshot| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::SnapshotResultsPage { items, next_page })
}

pub(super) fn snapshot_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = snapshot(rack, ask)?;
    Outcome::ok(&rack.snapshots.get(&id).ok_or_else(Refusal::internal)?.view)
}

pub(super) fn snapshot_create(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let project = rack.needed_project(ask, ask.query("project"))?;
    let body: types::SnapshotCreate = ask.body()?;
    let within = matches!(body.disk, types::NameOrId::Name(_)).then(|| project.to_string());
    let disk = rack.find(
        ask,
        &Kind::DISK,
        &rack.disks,
        &body.disk.to_string(),
        within.as_deref(),
    )?;
    if disk.view.project_id != project {
        return Err(Refusal::invalid(
            "can't create a snapshot of a disk in a different project",
        ));
    }
    if disk.view.disk_type == types::DiskType::Local {
        return Err(Refusal::invalid(
            "can't create a snapshot of a local storage disk",
        ));
    }
    if disk.view.read_only {
        return Err(Refusal::invalid("can't create a snapshot of a read-only disk"));
    }
    let (disk, size) = (disk.view.id, disk.view.size.0);
    if rack.snapshot_named(project, body.name.as_str()).is_some() {
        return Err(Refusal::exists(Kind::SNAPSHOT.resource, body.name.as_str()));
    }
    rack.check_storage(size)?;
    let id = rack.add_snapshot(body.name, body.description, disk)?;
    rack.touch();
    let due = Due::Finalized {
        disk,
        snapshot: Some(id),
    };
    rack.plan(rack.pace.finalize, due);
    Ok(Outcome::when(move |rack| match rack.snapshots.get(&id) {
        None => Some(Err(Refusal::internal())),
        Some(it) if it.view.state == types::SnapshotState::Creating => None,
        Some(it) => Some(Reply::json(201, &it.view)),
    }))
}

pub(super) fn snapshot_delete(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = snapshot(rack, ask)?;
    let state = rack.snapshots.get(&id).ok_or_else(Refusal::internal)?.view.state;
    if !matches!(state, types::SnapshotState::Ready | types::SnapshotState::Faulted) {
        return Err(Refusal::invalid(format!(
            "snapshot cannot be deleted in state {state:?}"
        )));
    }
    rack.snapshots.remove(&id);
    rack.touch();
    Ok(Outcome::After(rack.pace.disk_delete, Reply::empty()))
}

/// An image by ID, by name in a project, or by name in the silo where no project is given.
fn image(rack: &Rack, ask: &Ask) -> Result<Uuid> {
    let pick = Pick::parse(&ask.target)?;
    match (&pick, ask.query("project")) {
        (Pick::Id(_), Some(_)) => Err(Refusal::invalid(
            "when providing image as an ID, project should not be specified",
        )),
        (Pick::Id(id), None) => visible_image(rack, ask, *id).map(|image| image.view.id),
        (Pick::Name(name), Some(project)) => {
            let project = rack.project(ask, project)?;
            rack.image_named(Some(project), name)
                .ok_or_else(|| Refusal::not_found("project-image", &pick))
        }
        (Pick::Name(name), None) => rack
            .image_named(None, name)
            .ok_or_else(|| Refusal::not_found("silo-image", &pick)),
    }
}

pub(super) fn image_list(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let scan = Scan::of(ask)?;
    let project = match scan.project.as_deref() {
        Some(project) => Some(rack.project(ask, project)?),
        None => None,
    };
    let images = rack.images.values().map(|image| &image.view);
    let all = images.filter(|it| it.project_id == project);
    let (items, next_page) = scan.page(ask, rack.options.page, all, |it: &types::Image| {
        (it.name.to_string(), it.id)
    })?;
    Outcome::ok(&types::ImageResultsPage { items, next_page })
}

pub(super) fn image_view(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = image(rack, ask)?;
    Outcome::ok(&rack.images.get(&id).ok_or_else(Refusal::internal)?.view)
}

pub(super) fn image_create(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let project = match ask.query("project") {
        Some(project) => Some(rack.project(ask, project)?),
        None => None,
    };
    let body: types::ImageCreate = ask.body()?;
    let types::ImageSource::Snapshot(snapshot) = body.source;
    let snapshot = visible_snapshot(rack, ask, snapshot)?;
    if project.is_some_and(|project| project != snapshot.view.project_id) {
        return Err(Refusal::invalid("snapshot does not belong to this project"));
    }
    let (size, block_size, content) = (
        snapshot.view.size.clone(),
        snapshot.block_size.clone(),
        snapshot.content.clone(),
    );
    if rack.image_named(project, body.name.as_str()).is_some() {
        let kind = if project.is_some() {
            "project-image"
        } else {
            "silo-image"
        };
        return Err(Refusal::exists(kind, body.name.as_str()));
    }
    let (id, now) = (rack.id(), rack.now());
    let view = types::Image {
        block_size,
        description: body.description,
        digest: None,
        id,
        name: body.name,
        os: body.os,
        project_id: project,
        size,
        time_created: now,
        time_modified: now,
        version: body.version,
    };
    let reply = Reply::json(201, &view)?;
    rack.images.insert(id, Image { view, content });
    rack.touch();
    Ok(Outcome::After(rack.pace.image_create, reply))
}

pub(super) fn image_promote(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = image(rack, ask)?;
    let view = &rack.images.get(&id).ok_or_else(Refusal::internal)?.view;
    if view.project_id.is_none() {
        return Err(Refusal::invalid("Cannot promote a silo image"));
    }
    if rack.image_named(None, view.name.as_str()).is_some() {
        return Err(Refusal::exists("silo-image", view.name.as_str()));
    }
    let now = rack.now();
    let image = rack.images.get_mut(&id).ok_or_else(Refusal::internal)?;
    image.view.project_id = None;
    image.view.time_modified = now;
    let outcome = Outcome::accepted(&image.view);
    rack.touch();
    outcome
}

pub(super) fn image_delete(rack: &mut Rack, ask: &Ask) -> Result<Outcome> {
    let id = image(rack, ask)?;
    rack.images.remove(&id);
    rack.touch();
    Ok(Outcome::After(rack.pace.disk_delete, Reply::empty()))
}
