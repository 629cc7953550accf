//! Drives one Ganeti cluster through its RAPI: the verbs of [`Cloud`], each a call or a few.
//!
//! *Jobs.* Every change is a job of the cluster's queue. A verb that changes something returns when the job is submitted; the next
//! look meets it in the queue. The error of a job that failed is what the next try of the same verb returns, before anything is
//! submitted anew.
//!
//! *Ownership.* An instance carries our mark as tags, from its first moment on; a job that makes one carries it as its comment.
//! Names are unique in a cluster, whatever the node group, and instances move between nodes and groups: they are looked up by name
//! and belong to the group that they were made for.
//!
//! *Names.* RAPI takes the beginning of a name, up to a dot, for the name: every answer's name is compared, every removal names
//! the UUID. Jobs know no UUIDs in place of names.
//!
//! *Cancel safety.* Every verb may be dropped at any await. A job that was submitted goes on, and the next look meets it.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cloud::{
    BootProfile, Cloud, CloudError, Console, ErrorKind, Found, ImageKey, ImageRef, ImageSource, Instance,
    InstanceRef, InstanceSpec, InstanceState, Legacy, Limits, Marked, Replace, Result, Scope, UserData,
};
use crate::media::{Media, Seed, Seeds, Shelf};
use crate::secret::Secret;

mod class;
mod client;
mod convert;
mod failure;
mod jobs;
mod mark;
mod tls;

pub use class::{DataDisk, DiskTemplate, GanetiClass, Nic, NicMode, Parameter};
pub use client::{Settings, Trust};
pub use tls::Pin;

use client::Client;
use convert::{Boot, Theirs};
use failure::Failure;
use jobs::{Jobs, Kind, Status, Work, Works};
use mark::Owner;

const KIND: &str = "ganeti";

/// Most instances of which it is remembered that their creation ended well.
const WHOLE: usize = 10_000;

/// A node group of the cluster. Names of instances are unique in the cluster, whatever the group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Group(pub String);

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Scope for Group {}

/// One Ganeti cluster.
#[derive(Debug)]
pub struct Ganeti {
    client: Client,
    jobs: Jobs,
    /// What the provider serves, if it serves anything.
    media: Option<Media>,
    /// UUIDs of instances whose creation is known to have ended well, which nothing can change any more.
    whole: Mutex<HashSet<String>>,
}

/// What there is of a name.
struct Look {
    works: Works,
    theirs: Option<Theirs>,
}

/// How an instance of ours stands.
enum Standing {
    In(InstanceState),
    /// Its creation failed, or was cut off: something to be removed. When it was made, where nothing proves that nobody still
    /// works on it.
    Leftover(Option<crate::cloud::Timestamp>),
}

impl Ganeti {
    /// A backend for the cluster that `settings` name. Nothing is sent.
    ///
    /// # Errors
    ///
    /// `Rejected`, naming the setting that cannot be used.
    pub fn new(settings: &Settings) -> Result<Self> {
        Ok(Self {
            client: Client::new(settings)?,
            jobs: Jobs::default(),
            media: settings.media.clone(),
            whole: Mutex::default(),
        })
    }

    /// Where the password is: what is put there is sent from then on.
    #[must_use]
    pub fn password(&self) -> Arc<RwLock<Secret>> {
        self.client.password()
    }

    /// The instance of that name, whoever made it.
    async fn view(&self, name: &str) -> std::result::Result<Option<Theirs>, Failure> {
        let found = match self.client.get(&format!("/2/instances/{name}")).await {
            Err(failure) if failure.is_absence() => return Ok(None),
            found => found?,
        };
        let theirs: Theirs = serde_json::from_value(found).map_err(|_| Failure::not_rapi())?;
        // `web` would also be answered with `web.example.org`.
        Ok((theirs.name == name).then_some(theirs))
    }

    /// The queue first, then the instance: whoever made it in between is seen, so that an absence is one.
    async fn look(&self, name: &str) -> std::result::Result<Look, Failure> {
        let works = self.jobs.now(&self.client).await?;
        let theirs = self.view(name).await?;
        Ok(Look { works, theirs })
    }

    /// How instances of ours stand, one for each.
    async fn standings(
        &self,
        works: &[Work],
        instances: &[&Theirs],
    ) -> std::result::Result<Vec<Standing>, Failure> {
        let doubtful: Vec<&str> = instances
            .iter()
            .filter(|theirs| theirs.is_doubtful() && !self.is_whole(&theirs.uuid))
            .map(|theirs| theirs.name.as_str())
            .collect();
        // Their jobs may be done by now, and so no longer be in what we saw of the queue.
        let creations = match doubtful.as_slice() {
            [] => Vec::new(),
            names => self.jobs.creations(&self.client, names).await?,
        };
        Ok(instances
            .iter()
            .map(|theirs| self.standing(works, &creations, theirs))
            .collect())
    }

    fn standing(&self, works: &[Work], creations: &[Work], theirs: &Theirs) -> Standing {
        let creation = jobs::creation_of(creations, &theirs.name, theirs.ctime);
        let under_way = jobs::open(works, &theirs.name).is_some() || creation.is_some_and(Work::is_open);
        if under_way {
            return Standing::In(InstanceState::Starting);
        }
        if !theirs.is_doubtful() || self.is_whole(&theirs.uuid) {
            return Standing::In(theirs.at_rest());
        }
        match creation.map(|work| work.status) {
            Some(Status::Failed) => Standing::Leftover(None),
            Some(_) => {
                let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
                if whole.len() >= WHOLE {
                    whole.clear();
                }
                whole.insert(theirs.uuid.clone());
                Standing::In(InstanceState::Stopped)
            }
            // Archived hours ago.
            None if theirs.was_touched() => Standing::In(InstanceState::Stopped),
            // Nothing says that it is whole; nobody used it, so nothing is lost with it.
            None => Standing::Leftover(Some(convert::timestamp(theirs.ctime))),
        }
    }

    fn is_whole(&self, uuid: &str) -> bool {
        self.whole
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(uuid)
    }

    /// How the one instance of ours stands.
    async fn standing_of(&self, works: &[Work], theirs: &Theirs) -> std::result::Result<Standing, Failure> {
        let mut standings = self.standings(works, &[theirs]).await?;
        standings.pop().ok_or_else(Failure::not_rapi)
    }

    /// What carries a mark of this provider and, where one is named, this installation, and was made for this group.
    async fn marked(
        &self,
        works: &[Work],
        group: &Group,
        provider: &str,
        installation: Option<&str>,
    ) -> std::result::Result<Vec<(Theirs, Owner, Standing)>, Failure> {
        let mut filter = vec![json!("&")];
        let tags = mark::shared_tags(provider, installation, &group.0);
        filter.extend(tags.iter().map(|tag| json!(["=[]", "tags", tag])));
        let rows = self
            .client
            .query("instance", &convert::FIELDS, Value::Array(filter))
            .await?;
        let mut found = Vec::new();
        for row in rows {
            let theirs = Theirs::of_row(row).ok_or_else(Failure::not_rapi)?;
            // The tags of a longer value begin with those of a shorter one.
            let owner = theirs
                .owner()
                .filter(|owner| owner.is_within(group, provider, installation));
            found.extend(owner.map(|owner| (theirs, owner)));
        }
        let instances: Vec<&Theirs> = found.iter().map(|(theirs, _)| theirs).collect();
        let standings = self.standings(works, &instances).await?;
        let standing = |((theirs, owner), standing)| (theirs, owner, standing);
        Ok(found.into_iter().zip(standings).map(standing).collect())
    }

    /// Where the ISOs are that the provider serves.
    fn shelf(&self, verb: &'static str) -> Result<&Shelf> {
        let what = "the machine class has no boot_iso, and the provider serves no ISO itself: set boot_iso in the class, \
                    or `address` in [ganeti.media] of the provider's settings";
        let missing = || CloudError::new(KIND, verb, ErrorKind::Rejected, what);
        Ok(&self.media.as_ref().ok_or_else(missing)?.shelf)
    }

    /// Where the seeds are that the provider serves.
    fn seeds(&self, verb: &'static str) -> Result<&Seeds> {
        let what = "a machine with a boot_image reads its configuration from the provider, which serves none: set `address` \
                    in [ganeti.media] of the provider's settings";
        let missing = || CloudError::new(KIND, verb, ErrorKind::Rejected, what);
        Ok(&self.media.as_ref().ok_or_else(missing)?.seeds)
    }

    /// What a machine boots.
    fn boot_of(&self, verb: &'static str, spec: &InstanceSpec<Group, GanetiClass>) -> Result<Boot> {
        Ok(if spec.class.reads_seed() {
            Boot::Image {
                seed: self.seeds(verb)?.address(),
            }
        } else if spec.class.boots_from_provider() {
            Boot::Iso(self.shelf(verb)?.address(&spec.image.id))
        } else {
            Boot::Iso(convert::named_iso(spec))
        })
    }

    /// Brings what a machine reads while it boots, before it is started. What is there already, or is not ours to bring, stays.
    async fn bring(&self, verb: &'static str, theirs: &Theirs, user_data: &UserData) -> Result<()> {
        let Some(media) = &self.media else {
            return Ok(());
        };
        if media.shelf.misses(theirs.cdrom()).await? {
            let what = format!(
                "instance {:?}: the ISO that it boots is no longer in the media folder; it is fetched again if it is still \
                 that of the machine class, and else the machine has to be removed",
                theirs.name
            );
            return Err(busy(verb, what));
        }
        let seed = Seed {
            instance_id: &theirs.uuid,
            hostname: &theirs.name,
            user_data: &user_data.0,
        };
        media.seeds.put(theirs.extra(), seed).await?;
        Ok(())
    }

    /// Takes the CD out once the job that starts the instance has succeeded. What runs keeps it; the next start is without it, and
    /// so needs nothing of us any more.
    async fn detach(&self, theirs: &Theirs, start: u64) -> std::result::Result<(), Failure> {
        let body = json!({
            "instance_uuid": theirs.uuid,
            "hvparams": {convert::CDROM: ""},
            "depends": [[start, ["success"]]],
        });
        let path = format!("/2/instances/{}/modify", theirs.name);
        self.client.submit(Method::PUT, &path, Some(&body)).await?;
        Ok(())
    }

    /// Submits the removal of this very instance.
    async fn remove(&self, theirs: &Theirs) -> std::result::Result<(), Failure> {
        let body = json!({"instance_uuid": theirs.uuid, "shutdown_timeout": 0});
        let path = format!("/2/instances/{}", theirs.name);
        self.client.submit(Method::DELETE, &path, Some(&body)).await?;
        Ok(())
    }
}

fn show(instance: &InstanceRef<Group>) -> String {
    format!("instance {:?}", instance.name)
}

fn is_ours(theirs: &Theirs, instance: &InstanceRef<Group>) -> bool {
    theirs.owner().is_some_and(|owner| owner == Owner::of(instance))
}

/// Whether a job makes this instance, for this request.
fn makes(work: &Work, instance: &InstanceRef<Group>) -> bool {
    Owner::of_comment(&work.comment).is_some_and(|owner| owner == Owner::of(instance))
}

fn busy(verb: &'static str, what: String) -> CloudError {
    CloudError::new(KIND, verb, ErrorKind::Busy, what)
}

impl Cloud for Ganeti {
    type Class = GanetiClass;
    type Scope = Group;

    const KIND: &'static str = KIND;
    const LIMITS: Limits = Limits {
        name: convert::MAX_NAME,
        user_data: convert::MAX_USER_DATA,
    };

    fn validate(class: &GanetiClass) -> Vec<String> {
        class::validate(class)
    }

    fn scopes(class: &GanetiClass) -> Vec<Group> {
        class.node_groups.iter().cloned().map(Group).collect()
    }

    fn boot(class: &GanetiClass) -> BootProfile {
        BootProfile {
            // The second reads its kernel's arguments alone: Ganeti has no user data.
            platform: if class.reads_seed() { "nocloud" } else { "metal" },
            // Ganeti's KVM knows the PC machine alone.
            arch: "amd64",
            // Otherwise the ISO is where the class says.
            format: class.boots_from_provider().then_some("iso"),
            // KVM's serial console, which `gnt-instance console` shows.
            kernel_args: vec!["console=ttyS0".to_owned()],
            extensions: vec!["siderolabs/qemu-guest-agent".to_owned()],
            nameservers: class.nameservers.clone(),
        }
    }

    fn replace(class: &GanetiClass) -> Replace {
        class.replace
    }

    /// The Go library knew no Ganeti.
    fn legacy(_: &[u8]) -> Option<Legacy<Group>> {
        None
    }

    /// No call: RAPI gives a console's address, on a node that only operators reach.
    async fn read_console(&self, _: &InstanceRef<Group>) -> Result<Option<Console>> {
        Ok(None)
    }

    /// One call.
    async fn check(&self) -> Result<()> {
        let fault = |failure: Failure| failure.error("check the credentials", "cluster");
        let info = self.client.get("/2/info").await.map_err(fault)?;
        if info.get("master").and_then(Value::as_str).is_none() {
            return Err(fault(Failure::not_rapi()));
        }
        Ok(())
    }

    /// No call: it is about the ISOs that the provider serves. RAPI cannot tell what a node has; the start says it.
    async fn find_image(&self, _: &Group, key: &ImageKey) -> Result<Option<ImageRef>> {
        let image = key.reference();
        let there = self.shelf("find image")?.has(&image.id).await?;
        Ok(there.then_some(image))
    }

    /// No call to the cluster: it fetches the ISO later.
    async fn import_image(&self, _: &Group, key: &ImageKey, source: &dyn ImageSource) -> Result<ImageRef> {
        let image = key.reference();
        self.shelf("import image")?.put(&image.id, source).await?;
        Ok(image)
    }

    /// Two calls; one of them is shared by all who ask at the same time. Three where the instance was just made.
    async fn find_instance(&self, instance: &InstanceRef<Group>) -> Result<Found> {
        let fault = |failure: Failure| failure.error("find instance", show(instance));
        let Look { works, theirs } = self.look(&instance.name).await.map_err(fault)?;
        let Some(theirs) = theirs else {
            let making = jobs::open_of(&works, Kind::Create, &instance.name);
            return Ok(match making.filter(|work| makes(work, instance)) {
                Some(work) => Found::Ours(Arc::new(convert::in_flight(
                    &instance.name,
                    work.job,
                    Owner::of(instance),
                ))),
                // Somebody else's is nothing of ours until it is there.
                None => Found::Nothing,
            });
        };
        if !is_ours(&theirs, instance) {
            let what = format!("{}: {}", show(instance), mark::stranger(&theirs.tags, instance));
            return Ok(Found::Foreign { what });
        }
        Ok(match self.standing_of(&works, &theirs).await.map_err(fault)? {
            Standing::In(state) => Found::Ours(Arc::new(theirs.show(Owner::of(instance), state))),
            Standing::Leftover(since) => Found::Remains { since },
        })
    }

    /// Three calls, one of them shared.
    async fn create_instance(&self, spec: &InstanceSpec<Group, GanetiClass>) -> Result<()> {
        const VERB: &str = "create instance";
        let instance = &spec.instance;
        let fault = |failure: Failure| failure.error(VERB, show(instance));
        let Look { works, theirs } = self.look(&instance.name).await.map_err(fault)?;
        // A removal whose instance is gone is about to end, and the queue keeps the order.
        let ending = |work: &&Work| work.kind == Kind::Remove && theirs.is_none();
        if let Some(work) = jobs::open(&works, &instance.name).filter(|work| !ending(work)) {
            return match work.kind == Kind::Create && makes(work, instance) {
                true => Ok(()),
                false => Err(busy(
                    VERB,
                    format!("{}: job {} is about it", show(instance), work.job),
                )),
            };
        }
        if let Some(theirs) = theirs {
            if !is_ours(&theirs, instance) {
                let what = format!("{}: {}", show(instance), mark::stranger(&theirs.tags, instance));
                return Err(CloudError::new(KIND, VERB, ErrorKind::Foreign, what));
            }
            return match self.standing_of(&works, &theirs).await.map_err(fault)? {
                Standing::In(_) => Ok(()),
                Standing::Leftover(_) => {
                    let what = format!(
                        "{}: what is left of an earlier attempt is in the way",
                        show(instance)
                    );
                    Err(busy(VERB, what))
                }
            };
        }
        let ended = self
            .jobs
            .tell(Kind::Create, &instance.name, |work| makes(work, instance));
        // A name that was taken then is free now.
        if let Some(failure) = ended
            .map(|work| work.failure())
            .filter(|failure| failure.kind != Some(ErrorKind::Foreign))
        {
            return Err(fault(failure));
        }
        let body = convert::create(spec, &self.boot_of(VERB, spec)?);
        self.client
            .submit(Method::POST, "/2/instances", Some(&body))
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Three calls, one of them shared; one more where the provider serves what it boots.
    async fn start_instance(&self, instance: &InstanceRef<Group>, user_data: &UserData) -> Result<()> {
        const VERB: &str = "start instance";
        let fault = |failure: Failure| failure.error(VERB, show(instance));
        let Look { works, theirs } = self.look(&instance.name).await.map_err(fault)?;
        let Some(theirs) = theirs else {
            return Err(busy(VERB, format!("{} does not exist", show(instance))));
        };
        if !is_ours(&theirs, instance) || instance.id.as_ref().is_some_and(|id| *id != theirs.uuid) {
            let what = format!("{}: {}", show(instance), mark::stranger(&theirs.tags, instance));
            return Err(CloudError::new(KIND, VERB, ErrorKind::Foreign, what));
        }
        if theirs.status == "running" || jobs::open_of(&works, Kind::Start, &instance.name).is_some() {
            return Ok(());
        }
        if let Some(work) = jobs::open(&works, &instance.name) {
            return Err(busy(
                VERB,
                format!("{}: job {} is about it", show(instance), work.job),
            ));
        }
        // A start carries no mark; whoever tried before us met the same.
        let since = theirs.ctime;
        let ended = self
            .jobs
            .tell(Kind::Start, &instance.name, |work| work.is_after(since));
        if let Some(work) = ended {
            return Err(fault(work.failure()));
        }
        self.bring(VERB, &theirs, user_data).await?;
        // By name: jobs know no UUIDs here. It was compared just now.
        let path = format!("/2/instances/{}/startup", theirs.name);
        let started = self.client.submit(Method::PUT, &path, None);
        let job = started.await.map_err(fault)?;
        if self
            .media
            .as_ref()
            .is_some_and(|media| media.shelf.is_ours(theirs.cdrom()))
        {
            self.detach(&theirs, job).await.map_err(fault)?;
        }
        Ok(())
    }

    /// Three calls, one of them shared.
    async fn delete_instance(&self, instance: &InstanceRef<Group>) -> Result<()> {
        const VERB: &str = "delete instance";
        let fault = |failure: Failure| failure.error(VERB, show(instance));
        let Look { works, theirs } = self.look(&instance.name).await.map_err(fault)?;
        let making = jobs::open_of(&works, Kind::Create, &instance.name).filter(|work| makes(work, instance));
        let job = instance.id.as_deref().and_then(convert::job_of_id);
        if let Some(work) = making {
            // What waits in the queue is taken out of it; what runs would go on, and is waited for.
            if job == Some(work.job) || (theirs.is_none() && instance.id.is_some()) {
                return self.cancel(VERB, instance, work.job).await;
            }
            return Err(busy(
                VERB,
                format!("{}: job {} is making it", show(instance), work.job),
            ));
        }
        let Some(theirs) = theirs.filter(|theirs| is_ours(theirs, instance)) else {
            return Ok(());
        };
        match &instance.id {
            Some(id) if *id == theirs.uuid => {}
            // It is another one by now; or the job has made its instance, which the next look shows.
            Some(_) => return Ok(()),
            None => {
                let standing = self.standing_of(&works, &theirs).await.map_err(fault)?;
                if matches!(standing, Standing::In(_)) {
                    return Err(busy(VERB, format!("{} exists", show(instance))));
                }
            }
        }
        if let Some(media) = &self.media {
            media.seeds.remove(theirs.extra()).await?;
        }
        if jobs::open_of(&works, Kind::Remove, &instance.name).is_some() {
            return Ok(());
        }
        let since = theirs.ctime;
        let ended = self
            .jobs
            .tell(Kind::Remove, &instance.name, |work| work.is_after(since));
        if let Some(work) = ended {
            return Err(fault(work.failure()));
        }
        self.remove(&theirs).await.map_err(fault)
    }

    /// Two calls; three where some were just made.
    async fn list_instances(
        &self,
        scope: &Group,
        provider: &str,
        installation: &str,
    ) -> Result<Vec<Instance>> {
        let fault = |failure: Failure| failure.error("list instances", format!("node group {scope}"));
        let works = self.jobs.now(&self.client).await.map_err(fault)?;
        let marked = self.marked(&works, scope, provider, Some(installation));
        let found = marked.await.map_err(fault)?;
        let mut listed: Vec<Instance> = found
            .iter()
            .filter_map(|(theirs, owner, standing)| match standing {
                Standing::In(state) => Some(theirs.show(owner.clone(), state.clone())),
                // For a find to show.
                Standing::Leftover(_) => None,
            })
            .collect();
        for work in works
            .iter()
            .filter(|work| work.is_open() && work.kind == Kind::Create)
        {
            let owner = Owner::of_comment(&work.comment)
                .filter(|owner| owner.is_within(scope, provider, Some(installation)));
            let listed_already = found.iter().any(|(theirs, ..)| theirs.name == work.instance);
            if let Some(owner) = owner.filter(|_| !listed_already) {
                listed.push(convert::in_flight(&work.instance, work.job, owner));
            }
        }
        Ok(listed)
    }

    /// The node groups that there are, and those that were when something of ours was made. Two calls.
    async fn list_scopes(&self) -> Result<Vec<Group>> {
        let fault = |failure: Failure| failure.error("list scopes", "the cluster's node groups");
        let text = |row: Vec<Value>| row.first()?.as_str().map(str::to_owned);
        let groups = self.client.query("group", &["name"], Value::Null).await;
        let groups = groups.map_err(fault)?.into_iter().map(text);
        let mut names: BTreeSet<String> = groups
            .collect::<Option<_>>()
            .ok_or_else(|| fault(Failure::not_rapi()))?;
        // A group that was renamed or removed since is still the one of their marks.
        let tags = self.client.query("instance", &["tags"], Value::Null).await;
        for row in tags.map_err(fault)? {
            let tags: Vec<String> = row
                .into_iter()
                .next()
                .and_then(|tags| serde_json::from_value(tags).ok())
                .ok_or_else(|| fault(Failure::not_rapi()))?;
            names.extend(Owner::read(tags.iter().map(String::as_str)).map(|owner| owner.group));
        }
        Ok(names.into_iter().map(Group).collect())
    }

    /// Two calls; three where some were just made. A creation in flight is the next look's.
    async fn list_marked(&self, scope: &Group, provider: &str) -> Result<Vec<Marked>> {
        let fault = |failure: Failure| failure.error("list marked", format!("node group {scope}"));
        let works = self.jobs.now(&self.client).await.map_err(fault)?;
        let found = self.marked(&works, scope, provider, None).await.map_err(fault)?;
        let shown = |(theirs, owner, standing): (Theirs, Owner, Standing)| Marked {
            name: theirs.name,
            id: matches!(standing, Standing::In(_)).then_some(theirs.uuid),
            mark: Some(owner.mark),
        };
        Ok(found.into_iter().map(shown).collect())
    }
}

impl Ganeti {
    /// Takes a creation out of the queue, if it has not begun.
    async fn cancel(&self, verb: &'static str, instance: &InstanceRef<Group>, job: u64) -> Result<()> {
        let answer = self
            .client
            .call(Method::DELETE, &format!("/2/jobs/{job}"), &[], None)
            .await;
        let answer = answer.map_err(|failure| failure.error(verb, show(instance)))?;
        if answer.get(0).and_then(Value::as_bool) == Some(true) {
            return Ok(());
        }
        Err(busy(verb, format!("{}: job {job} is making it", show(instance))))
    }
}

#[cfg(test)]
mod tests;
