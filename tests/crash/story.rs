//! The stories as data, and the one way to live any of them.

use std::collections::BTreeMap;
use std::time::Duration;

use omni_infra_provider::omni::Kind;
use omni_infra_provider::omni::kinds::{
    ConfigPatchRequestSpec, ConfigPatchRequests, InfraProviderStatusSpec, InfraProviderStatuses,
    LABEL_PROVIDER, LABEL_REQUEST, MachineRequestStatusSpec, MachineRequestStatuses, MachineRequests,
    MachineResources, Stage,
};
use omni_infra_provider::omni::wire::specs;
use omni_infra_provider::sandbox::omni::{Stored, types};
use tokio::time::{sleep, timeout};

use crate::support::World;
use crate::support::cloud::TestCloud;
use crate::support::tap::{Doom, Fate};

/// The one request of most stories.
const WEB: &str = "web";
/// The set of the others.
const SET: &str = "workers";
/// No step of a story is waited for any longer, in the world's time.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What there is before calls are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// Nothing; the daemon was never there.
    Nothing,
    /// An image.
    Image,
    /// A machine.
    Machine,
    /// A set of two machines.
    Set,
    /// A machine that the Go provider made; it has just been stopped for good.
    Go,
    /// A request that the Go provider has only just begun with.
    GoBegun,
    /// A request whose instance could not be created, and a disk of it. The daemon is dead.
    Remains,
}

/// How far a machine has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Importing,
    Creating,
    Starting,
}

/// What the operator does while calls are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Waits,
    Asks,
    AsksForTwo,
    TearsDown,
    /// Asks for a machine, and tears it down when it has come so far.
    AsksAndTearsDown(Step),
    ScalesToOne,
}

/// A story; in the end all that is still wanted is torn down too.
#[derive(Debug)]
pub(super) struct Story {
    pub(super) name: &'static str,
    before: Before,
    operator: Operator,
    /// Machines that are wanted at its end.
    wanted: usize,
    /// It adds no call to what others tell: once, on the simulated cloud, is enough.
    pub(super) once: bool,
    /// The import may be cut off for good. What it leaves goes with the next import of that image, so one more machine comes and
    /// goes.
    cut_off: bool,
}

const fn story(name: &'static str, before: Before, operator: Operator, wanted: usize) -> Story {
    Story {
        name,
        before,
        operator,
        wanted,
        once: matches!(before, Before::GoBegun) || matches!(operator, Operator::AsksForTwo),
        cut_off: matches!(operator, Operator::AsksAndTearsDown(Step::Importing)),
    }
}

pub(super) const STORIES: &[Story] = &[
    story("first-start-and-import", Before::Nothing, Operator::Asks, 1),
    story("creation", Before::Image, Operator::Asks, 1),
    story("two-at-once", Before::Image, Operator::AsksForTwo, 2),
    story("teardown", Before::Machine, Operator::TearsDown, 0),
    story("scale-down", Before::Set, Operator::ScalesToOne, 1),
    story(
        "deleted-while-importing",
        Before::Nothing,
        Operator::AsksAndTearsDown(Step::Importing),
        0,
    ),
    story(
        "deleted-while-creating",
        Before::Image,
        Operator::AsksAndTearsDown(Step::Creating),
        0,
    ),
    story(
        "deleted-while-starting",
        Before::Image,
        Operator::AsksAndTearsDown(Step::Starting),
        0,
    ),
    story("hand-over", Before::Go, Operator::Waits, 1),
    story("hand-over-half-made", Before::GoBegun, Operator::Waits, 1),
    story("hand-over-and-teardown", Before::Go, Operator::TearsDown, 0),
    story("remains", Before::Remains, Operator::Waits, 1),
    story("remains-and-teardown", Before::Remains, Operator::TearsDown, 0),
];

/// What came of a life.
#[derive(Debug)]
pub(super) struct Lived {
    /// Calls from the last start of the daemon to the end of the story.
    pub(super) calls: usize,
    /// Which of them changed nothing.
    pub(super) reads: Vec<usize>,
    /// How many of its dooms struck.
    pub(super) struck: usize,
    /// What is wrong with its end, and what the world is like.
    pub(super) end: Result<(), String>,
}

/// Lives the story in a world of its own, with the daemon started again after each of its deaths.
pub(super) async fn live<C: TestCloud>(story: &Story, dooms: &[Doom]) -> Lived {
    let mut world = World::<C>::open().await;
    // They are no part of a story, and in most of its time nothing else happens.
    world.pace.heartbeat = Duration::from_secs(3600);
    world.cloud.plant_stranger();
    let mut lived = Lived {
        calls: 0,
        reads: Vec::new(),
        struck: 0,
        end: Ok(()),
    };
    let end = tell(story, dooms, &mut world, &mut lived).await;
    lived.end = end.map_err(|reason| format!("{reason}\n{world}"));
    lived
}

async fn tell<C: TestCloud>(
    story: &Story,
    dooms: &[Doom],
    world: &mut World<C>,
    lived: &mut Lived,
) -> Result<(), String> {
    let strange = world.cloud.things();
    prepare(world, story.before).await?;
    let before = world.cloud.machines();
    world.forget_made();

    let mut dooms = dooms.iter().copied();
    let mut doom = dooms.next();
    world.doom(doom);
    if world.daemon_is_dead() {
        world.start_daemon().await;
    }
    operate(world, story.operator).await?;
    loop {
        let late = doom.is_none_or(|doom| doom.fate == Fate::DiesBefore);
        tokio::select! {
            settled = settle(world) => settled?,
            // A supervisor starts it again at once, or a person later.
            () = world.dies(), if !late => world.kill_daemon().await,
        }
        let (calls, struck) = world.counted();
        lived.calls = calls;
        lived.reads = world.reads();
        lived.struck += usize::from(struck);
        if !world.daemon_is_dead() {
            break;
        }
        if !struck {
            return Err("the daemon ended by itself".to_owned());
        }
        doom = dooms.next();
        world.doom(doom);
        world.start_daemon().await;
    }
    world.doom(None);

    is_wanted(world, story.wanted)?;
    if matches!(story.before, Before::Go) && story.wanted > 0 && world.cloud.machines() != before {
        return Err("what was taken over was touched".to_owned());
    }
    // Where there is one; it takes its requests along.
    let _ = world.omni.delete_request_set(SET);
    for request in world.omni.list::<MachineRequests>(C::PROVIDER) {
        world.tear_down(request.id());
    }
    settle(world).await?;
    if story.cut_off {
        world.request("next");
        settle(world).await?;
        world.tear_down("next");
        settle(world).await?;
    }
    is_nothing(world, &strange)
}

async fn settle<C: TestCloud>(world: &World<C>) -> Result<(), String> {
    match world.settles().await {
        true => Ok(()),
        false => Err("the world does not settle".to_owned()),
    }
}

async fn prepare<C: TestCloud>(world: &mut World<C>, before: Before) -> Result<(), String> {
    match before {
        Before::Nothing => return Ok(()),
        Before::Go => return go_machine(world).await,
        Before::GoBegun => {
            let intent = world.cloud.go_intent();
            go_request(world, intent, &MachineRequestStatusSpec::default());
            return Ok(());
        }
        Before::Image | Before::Machine => {
            world.start_daemon().await;
            world.request(WEB);
            settle(world).await?;
            is_wanted(world, 1)?;
            if before == Before::Image {
                world.tear_down(WEB);
                settle(world).await?;
            }
        }
        Before::Set => {
            world.start_daemon().await;
            set_of_two(world);
            settle(world).await?;
            is_wanted(world, 2)?;
        }
        Before::Remains => {
            world.start_daemon().await;
            world.request(WEB);
            let made = |world: &World<C>| world.instances().iter().any(|name| name == WEB);
            until(world, "an instance", made).await?;
            world.kill_daemon().await;
            world.cloud.leave_remains(WEB);
        }
    }
    Ok(())
}

async fn operate<C: TestCloud>(world: &World<C>, operator: Operator) -> Result<(), String> {
    match operator {
        Operator::Waits => {}
        Operator::Asks => {
            world.request(WEB);
        }
        Operator::AsksForTwo => set_of_two(world),
        Operator::TearsDown => {
            world.tear_down(WEB);
        }
        Operator::ScalesToOne => world.omni.scale(SET, 1).unwrap(),
        Operator::AsksAndTearsDown(step) => {
            world.forget_trace();
            world.request(WEB);
            let (call, pause) = match step {
                Step::Importing => C::WORDS.importing,
                Step::Creating => (C::WORDS.creating, Duration::ZERO),
                Step::Starting => (C::WORDS.starting, Duration::ZERO),
            };
            // A daemon that died before is torn down behind its back.
            let come = |world: &World<C>| world.has_traced(call) || world.daemon_is_dead();
            until(world, call, come).await?;
            sleep(pause).await;
            world.tear_down(WEB);
        }
    }
    Ok(())
}

async fn until<C: TestCloud>(
    world: &World<C>,
    what: &str,
    condition: impl Fn(&World<C>) -> bool,
) -> Result<(), String> {
    let met = async {
        while !condition(world) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, met)
        .await
        .map_err(|_| format!("never came: {what}"))
}

fn set_of_two<C: TestCloud>(world: &World<C>) {
    let template = World::<C>::template(C::CLASS);
    world.omni.create_request_set(SET, C::PROVIDER, 2, &template);
}

/// A running machine of the Go provider, with everything that it wrote to Omni.
async fn go_machine<C: TestCloud>(world: &World<C>) -> Result<(), String> {
    let (uuid, record) = world.cloud.plant_go(WEB);
    let status = MachineRequestStatusSpec {
        id: uuid.clone(),
        stage: Stage::Provisioned,
        ..MachineRequestStatusSpec::default()
    };
    go_request(world, record, &status);
    // It knows no installation.
    let registration = InfraProviderStatuses::encode(&InfraProviderStatusSpec::default(), &[]);
    go_put::<InfraProviderStatuses, C>(world, C::PROVIDER, registration);
    let patch = ConfigPatchRequestSpec {
        data: Some(format!(
            "machine:\n  kubelet:\n    extraConfig:\n      providerID: {}://{uuid}\n",
            C::PROVIDER
        )),
    };
    let id = format!("provider-id-{WEB}");
    go_put::<ConfigPatchRequests, C>(world, &id, ConfigPatchRequests::encode(&patch, &[]));
    let join = world
        .omni
        .get_raw(types::INFRA, types::PROVIDER_JOIN_CONFIGS, C::PROVIDER);
    let join: specs::ProviderJoinConfigSpec = join.unwrap().decode();
    world
        .omni
        .machine_booted(&uuid, join.config.unwrap().config.as_bytes());
    until(world, "the machine joined", |world| world.omni.is_joined(&uuid)).await
}

fn go_request<C: TestCloud>(world: &World<C>, record: bytes::Bytes, status: &MachineRequestStatusSpec) {
    world.request(WEB);
    let hold = |request: &mut Stored| {
        request.finalizers.insert(controller::<C>());
    };
    let requests = types::MACHINE_REQUESTS;
    world.omni.modify_raw(types::INFRA, requests, WEB, hold).unwrap();
    go_put::<MachineRequestStatuses, C>(world, WEB, MachineRequestStatuses::encode(status, &[]));
    go_put::<MachineResources, C>(world, WEB, record.to_vec());
}

fn go_put<K: Kind, C: TestCloud>(world: &World<C>, id: &str, spec: Vec<u8>) {
    let labels = [(LABEL_PROVIDER, C::PROVIDER), (LABEL_REQUEST, WEB)];
    world.omni.put_raw(Stored {
        owner: controller::<C>(),
        labels: BTreeMap::from(labels.map(|(key, value)| (key.to_owned(), value.to_owned()))),
        spec: spec.into(),
        ..Stored::new(&K::namespace(C::PROVIDER), &K::type_name(C::PROVIDER), id)
    });
}

/// The Go library's finalizer and owner, and ours.
fn controller<C: TestCloud>() -> String {
    format!("{}.ProvisionController", C::PROVIDER)
}

/// So many machines are wanted, and each is there once: made once, running, joined and told of.
fn is_wanted<C: TestCloud>(world: &World<C>, wanted: usize) -> Result<(), String> {
    let mut requests = world.omni.list::<MachineRequests>(C::PROVIDER);
    requests.retain(|request| !request.tearing_down());
    if requests.len() != wanted {
        return Err(format!("{} requests instead of {wanted}", requests.len()));
    }
    for request in &requests {
        let id = request.id();
        let machines = world.cloud.machines();
        let ours: Vec<_> = machines.iter().filter(|machine| machine.name == id).collect();
        let [machine] = ours.as_slice() else {
            return Err(format!("{} instances of {id}", ours.len()));
        };
        let status = world.status(id);
        if (status.stage, status.error.as_str()) != (Stage::Provisioned, "") {
            return Err(format!("the status of {id}: {status:?}"));
        }
        if !machine.running || status.id != machine.id || !world.omni.is_joined(&machine.id) {
            return Err(format!(
                "{machine:?} does not run, or did not join, or its UUID is not in {status:?}"
            ));
        }
        let patch = world
            .omni
            .get::<ConfigPatchRequests>(C::PROVIDER, &format!("provider-id-{id}"));
        let data = patch.and_then(|patch| patch.spec.data).unwrap_or_default();
        if !data.contains(&format!("{}://{}", C::PROVIDER, machine.id)) {
            return Err(format!("the patch of {id} does not name {machine:?}: {data}"));
        }
    }
    made_once(world)?;
    match world.cloud.images() {
        0 | 1 => Ok(()),
        images => Err(format!("{images} images")),
    }
}

/// No machine was ever made twice.
fn made_once<C: TestCloud>(world: &World<C>) -> Result<(), String> {
    let made = world.made();
    match made.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(twice) => Err(format!("made twice: {twice:?}")),
        None => Ok(()),
    }
}

/// Nothing but images is left, and strangers' things are as they were.
fn is_nothing<C: TestCloud>(world: &World<C>, strange: &[String]) -> Result<(), String> {
    made_once(world)?;
    let left = world.left_in_omni();
    if !left.is_empty() {
        return Err(format!("left in Omni: {left:?}"));
    }
    let things = world.cloud.things();
    if things != strange {
        let new = things.iter().filter(|thing| !strange.contains(thing));
        let gone = strange.iter().filter(|thing| !things.contains(thing));
        let (new, gone): (Vec<_>, Vec<_>) = (new.collect(), gone.collect());
        return Err(format!("left in the cloud: {new:?}, gone from it: {gone:?}"));
    }
    match world.cloud.images() {
        0 | 1 => Ok(()),
        images => Err(format!("{images} images")),
    }
}
