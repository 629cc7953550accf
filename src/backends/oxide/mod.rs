//! Drives one silo of an Oxide rack: the verbs of [`Cloud`], each a handful of calls to nexus.
//!
//! *Ownership.* Oxide has no labels, so the mark is the description of everything that we make; no call of
//! the API can change a description or a name. Disks outlive their instance and are found by their mark.
//!
//! *Absence.* Nexus says 404 to whoever may not look. A disk list of the project needs the same right as the
//! instance (viewer of the project) and fails where the project is not visible: only after one that worked is
//! an absence believed.
//!
//! *Cancel safety.* Every verb may be dropped at any await. What a call had already changed, the next look
//! shows.
//!
//! *Not here.* When to look again (`engine/retry.rs`), and the bytes of images (`engine/download.rs`).

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use oxide::prelude::*;
use oxide::types;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::cloud::{
    BootProfile, Cloud, CloudError, Console, ErrorKind, Found, ImageKey, ImageRef, ImageSource, Instance,
    InstanceRef, InstanceSpec, Legacy, Limits, Mark, Marked, Replace, Result, Scope, Shared, Timestamp,
    UserData,
};
use crate::secret::Secret;

mod class;
mod client;
mod convert;
mod failure;
mod image;
mod legacy;
mod mark;
#[cfg(test)]
#[cfg(feature = "sandbox")]
mod tests;

pub use class::{AutoRestart, CpuPlatform, DataDisk, DiskKind, Interface, IpConfig, OxideClass};
pub use client::Settings;

use client::Clients;
use convert::{KIND, Step};
use failure::{Failure, Sort};
use mark::{Claim, Owner};

/// Items per page of a list. Nexus allows far more; a page of a thousand disks is about half a megabyte.
const PAGE: u32 = 1000;
/// How much of the end of a serial console is read: some tens of lines. It travels as a JSON array of numbers, four times as long.
const CONSOLE: u64 = 16 * 1024;
/// Most pages of a list: many times what a rack holds. What goes on for longer does not end.
const PAGES: usize = 200;
/// Most instances whose last look is remembered, which is of use to a deletion that follows at once.
const LOOKS: usize = 1000;

/// A project of the silo, by name or ID: names of instances, disks and images are unique in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Project(pub String);

impl fmt::Display for Project {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Scope for Project {}

impl Project {
    /// The `project` parameter of a call.
    fn param(&self) -> std::result::Result<types::NameOrId, Failure> {
        convert::name_or_id(&self.0).map_err(Failure::rejected)
    }
}

/// What is of use of a disk: lists hold tens of thousands.
struct Disk {
    id: Uuid,
    name: String,
    description: String,
    state: types::DiskState,
    created: Timestamp,
}

impl From<types::Disk> for Disk {
    fn from(theirs: types::Disk) -> Self {
        Self {
            id: theirs.id,
            name: theirs.name.into(),
            description: theirs.description,
            state: theirs.state,
            created: convert::timestamp(theirs.time_created),
        }
    }
}

/// What a look at an instance of ours showed, and whom we looked for.
struct Look {
    mark: Mark,
    adopt_bare: bool,
    state: types::InstanceState,
}

/// How a silo is asked, with a token that may be replaced while the silo is in use. Clones share it.
#[derive(Clone)]
pub struct Credentials {
    settings: Arc<Settings>,
    clients: Arc<RwLock<Clients>>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Sends all later calls with another token.
    ///
    /// # Errors
    ///
    /// `Rejected`, if it cannot be one.
    pub fn replace(&self, token: &Secret) -> Result<()> {
        let settings = Settings {
            token: token.clone(),
            ..(*self.settings).clone()
        };
        let clients = Clients::new(&settings)?;
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = clients;
        Ok(())
    }

    fn clients(&self) -> Clients {
        self.clients
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// One silo of an Oxide rack.
pub struct Oxide {
    credentials: Credentials,
    /// The provider ID, for what is made without a machine request: scratch disks of imports.
    provider: String,
    /// What `find_instance` last saw of an instance of ours, taken by the next `delete_instance`. It saves
    /// that verb its own look; nexus checks the state once more, and neither name nor mark of an instance can
    /// ever change.
    looks: Mutex<HashMap<Uuid, Look>>,
    /// The lists of disks under way, one for each project in use.
    disks: Mutex<HashMap<Project, Arc<Shared<Vec<Disk>>>>>,
    /// Scratch disks that an import of this process is writing to right now.
    scratch: Mutex<Vec<String>>,
    /// Images whose scratch disks this process has looked for; as many as there are images in use.
    tidied: Mutex<HashSet<(Project, ImageKey)>>,
}

impl fmt::Debug for Oxide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Oxide")
            .field("provider", &self.provider)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Oxide {
    /// A backend for the silo that `settings` name. Nothing is sent.
    ///
    /// # Errors
    ///
    /// `Rejected`, naming the setting that cannot be used.
    pub fn new(settings: &Settings) -> Result<Self> {
        Ok(Self {
            credentials: Credentials {
                clients: Arc::new(RwLock::new(Clients::new(settings)?)),
                settings: Arc::new(settings.clone()),
            },
            provider: settings.provider_id.clone(),
            looks: Mutex::default(),
            disks: Mutex::default(),
            scratch: Mutex::default(),
            tidied: Mutex::default(),
        })
    }

    /// What its calls are signed with.
    #[must_use]
    pub fn credentials(&self) -> Credentials {
        self.credentials.clone()
    }

    fn client(&self) -> Arc<oxide::Client> {
        self.credentials.clients().calls
    }

    /// The instance of that name, whoever made it.
    async fn view(
        &self,
        instance: &InstanceRef<Project>,
    ) -> std::result::Result<Option<types::Instance>, Failure> {
        let found = self
            .client()
            .instance_view()
            .project(instance.scope.param()?)
            .instance(convert::name(&instance.name).map_err(Failure::rejected)?)
            .send()
            .await;
        absent_is_none(found)
    }

    /// All disks of the project, by a list that is begun from now on and serves all who ask meanwhile.
    async fn disks(&self, project: &Project) -> std::result::Result<Arc<Vec<Disk>>, Failure> {
        let list = lock(&self.disks).entry(project.clone()).or_default().clone();
        list.ask(self.list_disks(project, |disk| Some(disk.into()))).await
    }

    /// What `keep` makes of all disks of the project, whoever made them.
    async fn list_disks<T>(
        &self,
        project: &Project,
        keep: impl FnMut(types::Disk) -> Option<T>,
    ) -> std::result::Result<Vec<T>, Failure> {
        let project = project.param()?;
        let page = |token| {
            let (client, project) = (self.credentials.clients().lists, project.clone());
            async move {
                let list = client.disk_list().limit(PAGE);
                // A token names the project too.
                let page = match token {
                    None => list.project(project),
                    Some(token) => list.page_token(token),
                };
                let page = page.send().await?.into_inner();
                Ok((page.items, page.next_page))
            }
        };
        all_pages(page, keep).await
    }

    /// What `keep` makes of all instances of the project, whoever made them.
    async fn instances<T>(
        &self,
        project: &Project,
        keep: impl FnMut(types::Instance) -> Option<T>,
    ) -> std::result::Result<Vec<T>, Failure> {
        let project = project.param()?;
        let page = |token| {
            let (client, project) = (self.credentials.clients().lists, project.clone());
            async move {
                let list = client.instance_list().limit(PAGE);
                // A token names the project too.
                let page = match token {
                    None => list.project(project),
                    Some(token) => list.page_token(token),
                };
                let page = page.send().await?.into_inner();
                Ok((page.items, page.next_page))
            }
        };
        all_pages(page, keep).await
    }

    fn remember(&self, theirs: &types::Instance, asked: &InstanceRef<Project>) {
        let mut looks = lock(&self.looks);
        if looks.len() >= LOOKS {
            looks.clear();
        }
        let look = Look {
            mark: asked.mark.clone(),
            adopt_bare: asked.adopt_bare,
            state: theirs.run_state,
        };
        looks.insert(theirs.id, look);
    }

    /// Takes the state of the last look, if that was for the same and leaves something to do.
    fn recall(&self, id: Uuid, asked: &InstanceRef<Project>) -> Option<types::InstanceState> {
        let look = lock(&self.looks).remove(&id)?;
        let same = look.mark == asked.mark && look.adopt_bare == asked.adopt_bare;
        (same && convert::step_down(look.state) != Step::Wait).then_some(look.state)
    }

    /// Of the disks that are attached to an instance, those that were made for it. No more than a hint: a look at the whole project
    /// finds what is missing here.
    async fn attached(&self, id: Uuid, instance: &InstanceRef<Project>) -> Vec<Disk> {
        // One page, whether another one follows or not.
        let list = self
            .client()
            .instance_disk_list()
            .instance(id)
            .limit(PAGE)
            .send()
            .await;
        let disks = list.map_or_else(|_| Vec::new(), |page| page.into_inner().items);
        let disks = disks.into_iter().map(Disk::from);
        disks
            .filter(|disk| mark::is_disk_of(&disk.name, &disk.description, instance))
            .collect()
    }

    /// Deletes the disks that were made for an instance that is no more.
    async fn delete_leftovers(&self, verb: &'static str, instance: &InstanceRef<Project>) -> Result<()> {
        let project = &instance.scope;
        let all = self
            .disks(project)
            .await
            .map_err(|failure| unless_hidden(failure, verb, project))?;
        let is_left = |disk: &&Disk| {
            mark::is_disk_of(&disk.name, &disk.description, instance)
                && !matches!(disk.state, types::DiskState::Destroyed)
        };
        let (free, held): (Vec<_>, Vec<_>) = all
            .iter()
            .filter(is_left)
            .partition(|disk| convert::deletable(&disk.state));
        if free.is_empty() && !held.is_empty() {
            let held = held.iter().map(|disk| {
                let state = convert::disk_state(&disk.state);
                format!("disk {:?} in project {project} is {state}", disk.name)
            });
            let what = held.collect::<Vec<_>>().join("; ");
            return Err(CloudError::new(KIND, verb, ErrorKind::Busy, what));
        }
        self.delete_disks(verb, project, free).await
    }

    async fn delete_disks(
        &self,
        verb: &'static str,
        project: &Project,
        disks: impl IntoIterator<Item = &Disk>,
    ) -> Result<()> {
        for disk in disks {
            let deleted = self.client().disk_delete().disk(disk.id).send().await;
            match deleted.map_err(Failure::from) {
                Ok(_) => {}
                Err(failure) if failure.sort == Sort::NotFound => {}
                Err(failure) => {
                    let what = format!("disk {:?} in project {project}", disk.name);
                    return Err(failure.busy_if_refused().error(verb, what));
                }
            }
        }
        Ok(())
    }
}

/// What `keep` makes of everything that a list holds; no more than one page of the rest is held at a time. The crate's own stream of
/// it asks for ever where the answers lead in a circle.
async fn all_pages<T, U, P>(
    mut page: impl FnMut(Option<String>) -> P,
    mut keep: impl FnMut(T) -> Option<U>,
) -> std::result::Result<Vec<U>, Failure>
where
    P: Future<Output = std::result::Result<(Vec<T>, Option<String>), Failure>>,
{
    let (mut all, mut token) = (Vec::new(), None);
    for _ in 0..PAGES {
        let (items, next) = page(token.clone()).await?;
        all.extend(items.into_iter().filter_map(&mut keep));
        if next.is_none() {
            return Ok(all);
        }
        if next == token {
            break;
        }
        token = next;
    }
    Err(Failure::endless())
}

fn absent_is_none<T>(
    answer: std::result::Result<oxide::ResponseValue<T>, oxide::Error<types::Error>>,
) -> std::result::Result<Option<T>, Failure> {
    match answer.map_err(Failure::from) {
        Ok(found) => Ok(Some(found.into_inner())),
        Err(failure) if failure.sort == Sort::NotFound => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// The error of a call that asks about the project itself: there, 404 never is an absence.
fn unless_hidden(failure: Failure, verb: &'static str, project: &Project) -> CloudError {
    match failure.sort {
        Sort::NotFound => failure.error_of(
            ErrorKind::Denied,
            verb,
            format!("project {project} not found or not visible to this token"),
        ),
        _ => failure.error(verb, format!("project {project}")),
    }
}

fn show(instance: &InstanceRef<Project>) -> String {
    format!("instance {:?} in project {}", instance.name, instance.scope)
}

impl Cloud for Oxide {
    type Class = OxideClass;
    type Scope = Project;

    const KIND: &'static str = KIND;
    const LIMITS: Limits = Limits {
        name: convert::MAX_INSTANCE_NAME,
        user_data: convert::MAX_USER_DATA,
    };

    fn validate(class: &OxideClass) -> Vec<String> {
        class::validate(class)
    }

    fn scopes(class: &OxideClass) -> Vec<Project> {
        vec![Project(class.project.clone())]
    }

    fn boot(class: &OxideClass) -> BootProfile {
        BootProfile {
            platform: "nocloud",
            // There is no field for anything else in this API.
            arch: "amd64",
            format: Some("raw.xz"),
            // A rack has serial consoles alone; the ones of the nocloud image come first and would take the
            // output.
            kernel_args: vec!["-console".to_owned(), "console=ttyS0".to_owned()],
            extensions: vec![
                "siderolabs/amd-ucode".to_owned(),
                "siderolabs/iscsi-tools".to_owned(),
                "siderolabs/util-linux-tools".to_owned(),
            ],
            nameservers: class.nameservers.clone(),
        }
    }

    fn replace(class: &OxideClass) -> Replace {
        class.replace
    }

    fn legacy(spec: &[u8]) -> Option<Legacy<Project>> {
        legacy::legacy(spec)
    }

    /// One call.
    async fn check(&self) -> Result<()> {
        let me = self.client().current_user_view().send().await;
        me.map_err(|error| Failure::from(error).error("check the credentials", "current user"))?;
        Ok(())
    }

    /// One call; two where the project has no such image.
    /// The first time that this process finds an image, it also removes the scratch disks of imports that were cut off after the
    /// image was made: no import of it would come any more that could.
    async fn find_image(&self, scope: &Project, key: &ImageKey) -> Result<Option<ImageRef>> {
        let found = self.image(scope, key).await?;
        if found.is_some() {
            self.tidy_once(scope, key).await;
        }
        Ok(found)
    }

    async fn import_image(
        &self,
        scope: &Project,
        key: &ImageKey,
        source: &dyn ImageSource,
    ) -> Result<ImageRef> {
        self.import(scope, key, source).await
    }

    /// One call where there is an instance of ours, two (and a page for each further thousand disks) where
    /// there is none.
    async fn find_instance(&self, instance: &InstanceRef<Project>) -> Result<Found> {
        const VERB: &str = "find instance";
        // By name even where the ID is known: a name is unique in its project and cannot be changed, so the
        // one look answers both what became of ours and who has taken its name since.
        let theirs = self
            .view(instance)
            .await
            .map_err(|failure| failure.error(VERB, show(instance)))?;
        let mut stranger = None;
        if let Some(theirs) = theirs {
            match mark::claim(&theirs.name, &theirs.description, instance) {
                Claim::Ours(mark) => {
                    if let Some(ours) = convert::instance(&theirs, mark) {
                        self.remember(&theirs, instance);
                        return Ok(Found::Ours(Arc::new(ours)));
                    }
                }
                Claim::Foreign(whose) => stranger = Some(format!("{}: {whose}", show(instance))),
            }
        }
        let disks = self
            .disks(&instance.scope)
            .await
            .map_err(|failure| unless_hidden(failure, VERB, &instance.scope))?;
        let (mut remains, mut since) = (false, None);
        for disk in disks.iter() {
            if matches!(disk.state, types::DiskState::Destroyed) {
                continue;
            }
            if mark::is_disk_of(&disk.name, &disk.description, instance) {
                remains = true;
                since = Some(since.map_or(disk.created, |oldest| disk.created.min(oldest)));
            } else if disk.name == instance.name && stranger.is_none() {
                // The boot disk takes the instance's own name: this one blocks every create.
                let Claim::Foreign(whose) = mark::claim(&disk.name, &disk.description, instance) else {
                    continue;
                };
                stranger = Some(format!(
                    "disk {:?} in project {}: {whose}",
                    instance.name, instance.scope
                ));
            }
        }
        Ok(match stranger {
            _ if remains => Found::Remains { since },
            Some(what) => Found::Foreign { what },
            None => Found::Nothing,
        })
    }

    /// One call; up to two more where the name is taken.
    async fn create_instance(&self, spec: &InstanceSpec<Project, OxideClass>) -> Result<()> {
        const VERB: &str = "create instance";
        let instance = &spec.instance;
        let fault = |failure: Failure| failure.error(VERB, show(instance));
        let body = convert::instance_create(spec).map_err(|words| fault(Failure::rejected(words)))?;
        let project = instance.scope.param().map_err(fault)?;
        match client::create_instance(&self.client(), &project, &body).await {
            Ok(_) => Ok(()),
            // It may be ours: created by a call whose answer was lost, or by another daemon. Nexus says the
            // same of a disk's name, so that the instance may well not exist.
            Err(failure) if failure.sort == Sort::AlreadyExists => {
                match self.find_instance(instance).await? {
                    Found::Ours(_) => Ok(()),
                    Found::Remains { .. } => Err(failure.error_of(
                        ErrorKind::Busy,
                        VERB,
                        format!(
                            "{}: what is left of an earlier attempt is in the way",
                            show(instance)
                        ),
                    )),
                    Found::Foreign { what } => Err(failure.error_of(ErrorKind::Foreign, VERB, what)),
                    // Another thing's name is taken, by a disk of somebody else's; or the instance has gone
                    // since.
                    Found::Nothing if failure.words.contains("already exists: disk ") => {
                        Err(failure.error_of(ErrorKind::Foreign, VERB, show(instance)))
                    }
                    Found::Nothing => Err(failure.error_of(ErrorKind::Busy, VERB, show(instance))),
                }
            }
            Err(failure) => Err(fault(failure)),
        }
    }

    /// One call. It has its user data from the creation.
    async fn start_instance(&self, instance: &InstanceRef<Project>, _: &UserData) -> Result<()> {
        const VERB: &str = "start instance";
        let id = match &instance.id {
            Some(id) => parse_id(VERB, id)?,
            // Nobody looked yet: never start what is not ours.
            None => match self.find_instance(instance).await? {
                Found::Ours(ours) => parse_id(VERB, &ours.id)?,
                Found::Foreign { what } => {
                    return Err(CloudError::new(KIND, VERB, ErrorKind::Foreign, what));
                }
                Found::Remains { .. } | Found::Nothing => {
                    let what = format!("{} does not exist", show(instance));
                    return Err(CloudError::new(KIND, VERB, ErrorKind::Busy, what));
                }
            },
        };
        match self
            .client()
            .instance_start()
            .instance(id)
            .send()
            .await
            .map_err(Failure::from)
        {
            Ok(_) => Ok(()),
            // Gone since the last look; the next one shows it.
            Err(failure) if failure.sort == Sort::NotFound => {
                Err(failure.error_of(ErrorKind::Busy, VERB, show(instance)))
            }
            Err(failure) => Err(failure.error(VERB, show(instance))),
        }
    }

    /// One call for a stop, two and one for each disk for a deletion; one more where nobody looked just
    /// before, and where a disk was not attached.
    async fn delete_instance(&self, instance: &InstanceRef<Project>) -> Result<()> {
        const VERB: &str = "delete instance";
        let fault = |failure: Failure| failure.busy_if_refused().error(VERB, show(instance));
        let Some(id) = &instance.id else {
            return self.delete_leftovers(VERB, instance).await;
        };
        let id = parse_id(VERB, id)?;
        let state = match self.recall(id, instance) {
            Some(state) => Some(state),
            None => {
                let seen = self.client().instance_view().instance(id).send().await;
                match absent_is_none(seen).map_err(fault)? {
                    None => None,
                    Some(theirs) => {
                        if let Claim::Foreign(whose) =
                            mark::claim(&theirs.name, &theirs.description, instance)
                        {
                            let what = format!("{}: {whose}", show(instance));
                            return Err(CloudError::new(KIND, VERB, ErrorKind::Foreign, what));
                        }
                        Some(theirs.run_state)
                    }
                }
            }
        };
        match state.map(|state| (state, convert::step_down(state))) {
            Some((_, Step::Stop)) => {
                match self
                    .client()
                    .instance_stop()
                    .instance(id)
                    .send()
                    .await
                    .map_err(Failure::from)
                {
                    Ok(_) => return Ok(()),
                    Err(failure) if failure.sort == Sort::NotFound => {}
                    Err(failure) => return Err(fault(failure)),
                }
            }
            Some((state, Step::Wait)) => {
                let what = format!("{} is {state}", show(instance));
                return Err(CloudError::new(KIND, VERB, ErrorKind::Busy, what));
            }
            Some((_, Step::Delete)) => {
                // Asked while it has them: a list of the whole project is long, and many wait for it.
                let disks = self.attached(id, instance).await;
                match self
                    .client()
                    .instance_delete()
                    .instance(id)
                    .send()
                    .await
                    .map_err(Failure::from)
                {
                    Ok(_) => {}
                    Err(failure) if failure.sort == Sort::NotFound => {}
                    Err(failure) => return Err(fault(failure)),
                }
                if !disks.is_empty() {
                    return self.delete_disks(VERB, &instance.scope, &disks).await;
                }
            }
            None => {}
        }
        self.delete_leftovers(VERB, instance).await
    }

    /// One call. Propolis keeps the console of a VMM while there is one; of an instance that does not run, nexus refuses it
    /// (`app/instance.rs`, `propolis_addr_for_instance`).
    async fn read_console(&self, instance: &InstanceRef<Project>) -> Result<Option<Console>> {
        const VERB: &str = "read console";
        let Some(id) = &instance.id else { return Ok(None) };
        let seen = self
            .client()
            .instance_serial_console()
            .instance(parse_id(VERB, id)?)
            .most_recent(CONSOLE)
            .max_bytes(CONSOLE)
            .send()
            .await;
        match seen.map_err(Failure::from) {
            Ok(seen) => {
                let text = String::from_utf8_lossy(&seen.data).into_owned();
                Ok(Some(Console(text)))
            }
            Err(failure) if matches!(failure.sort, Sort::NotFound | Sort::Kind(ErrorKind::Rejected)) => {
                Ok(None)
            }
            Err(failure) => Err(failure.error(VERB, show(instance))),
        }
    }

    /// One call for each thousand instances of the project, whoever made them.
    async fn list_instances(
        &self,
        scope: &Project,
        provider: &str,
        installation: &str,
    ) -> Result<Vec<Instance>> {
        const VERB: &str = "list instances";
        let ours = |theirs: types::Instance| {
            let mark = match mark::owner(&theirs.description) {
                Some(Owner::Marked(mark))
                    if mark.provider == provider && mark.installation == installation =>
                {
                    Some(mark)
                }
                Some(Owner::Bare(bare)) if bare == provider => None,
                _ => return None,
            };
            convert::instance(&theirs, mark)
        };
        self.instances(scope, ours)
            .await
            .map_err(|failure| unless_hidden(failure, VERB, scope))
    }

    /// One call for each thousand projects that the token may see.
    async fn list_scopes(&self) -> Result<Vec<Project>> {
        let client = self.client();
        let page = |token| {
            let list = client.project_list().limit(PAGE);
            let page = match token {
                None => list,
                Some(token) => list.page_token(token),
            };
            async move {
                let page = page.send().await?.into_inner();
                Ok((page.items, page.next_page))
            }
        };
        let name = |project: types::Project| Some(Project(project.name.to_string()));
        all_pages(page, name)
            .await
            .map_err(|failure| failure.error("list scopes", "the silo's projects"))
    }

    /// One call for each thousand disks and one for each thousand instances of the project, whoever made them.
    async fn list_marked(&self, scope: &Project, provider: &str) -> Result<Vec<Marked>> {
        const VERB: &str = "list marked";
        let hidden = |failure| unless_hidden(failure, VERB, scope);
        let ours = |description: &str| mark::of_provider(description, provider);
        // Disks first: what is made in between is an instance with disks that were not listed, never the other way round.
        let mut left = HashSet::new();
        let disk = |disk: types::Disk| {
            let mark = ours(&disk.description)?;
            if !matches!(disk.state, types::DiskState::Destroyed) {
                left.insert((mark::instance_of_disk(&disk.name).to_owned(), mark));
            }
            None::<()>
        };
        self.list_disks(scope, disk).await.map_err(hidden)?;
        let instance = |theirs: types::Instance| {
            let mark = ours(&theirs.description)?;
            if theirs.run_state == types::InstanceState::Destroyed {
                return None;
            }
            let holder = (theirs.name.to_string(), mark);
            left.remove(&holder);
            let ((name, mark), id) = (holder, Some(theirs.id.to_string()));
            Some(Marked { name, id, mark })
        };
        let mut marked = self.instances(scope, instance).await.map_err(hidden)?;
        let mut left: Vec<_> = left.into_iter().collect();
        left.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let left = left.into_iter();
        marked.extend(left.map(|(name, mark)| Marked { name, id: None, mark }));
        Ok(marked)
    }
}

/// The vendor's ID in the API's type.
fn parse_id(verb: &'static str, id: &str) -> Result<Uuid> {
    id.parse().map_err(|_| {
        CloudError::new(
            KIND,
            verb,
            ErrorKind::Rejected,
            format!("{id:?} is not the ID of an instance"),
        )
    })
}
