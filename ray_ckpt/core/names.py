"""Names of everything on storage. No other module formats or parses one.

<root>/
    step-500/                      a DCP checkpoint
        ray_ckpt.manifest.json         written last, removed first: it alone means "committed"
        ray_ckpt.index.npz             what .metadata says, in columns of numbers
        ray_ckpt.pin.<name>.json       keeps the step from every purge
        hf_assets/                     config.json and tokenizer, for exports
    exports/<name>/step-500/       a Hugging Face folder with a manifest of its own
    exports/<name>/latest          at a destination: leads to a step; any word may be its name
    .ray_ckpt/                     ours alone
        run.json                       the run's id and policy
        lease/<role>-<epoch>.json      who may write; the highest epoch owns
        requests/<key>.json            what was asked for
        commands/<verb>-<key>.json     what a person wants of an action: retry, cancel, purge
        logs/<key>-a<attempt>.log      what a failed attempt said
        save-now.json                  the trainer is asked to save at its next step
        readers/500.<token>.json       somebody reads step 500: a heartbeat
        actions/<key>.json             what became of it
        running/<key>-a<attempt>.json  an attempt that runs: a heartbeat, and how far it is
        staging/<attempt>/             unfinished work, private to one attempt
        staging/step-500.begun         object stores: what lies in step-500/ is ours and unfinished
        trash/step-500.<save id>/      purged, and back with `undo` until the grace time is over;
                                       on an object store its shards stay in step-500/
        staging/exports/<name>/step-500.retired   a copy there is being removed
        drafts/<save id>.json          a save that lies on its nodes: its manifest, what is where
        drafts/<save id>.ended.json    what became of it
        staging/gather-<save id>/      what was brought of it; on an object store its shards wait
                                       in step-500/
        events/<time>-<who>-<id>.jsonl what happened, in batches that are never rewritten
        snapshot.json                  what the manager has told of last
        store-<endpoint>.json          object stores: what the store there does and does not
        elections/<key>/<token>.json   object stores: somebody is about to create an object
        probes/                        object stores: what that is found out with; empty
        hub/<org>/<repository>.json    content of copies that went from there and is not free yet
        taken/<folder>.json            a folder of others that a step leads to, or once led to
        quarantine/step-500.<save id>/ damaged, never deleted by a policy

Keys are relative to the root and separated by "/", on every backend.
"""

import hashlib
import re

MANIFEST = "ray_ckpt.manifest.json"
METADATA = ".metadata"
"""DCP's own index of a checkpoint (a pickle), as torch names it."""
INDEX = "ray_ckpt.index.npz"
"""The same as columns of numbers, which a load needs; a folder of others has none."""
ASSETS = "hf_assets"
EXPORTS = "exports"
PRIVATE = ".ray_ckpt"
RUN = f"{PRIVATE}/run.json"
LEASES = f"{PRIVATE}/lease"
READERS = f"{PRIVATE}/readers"
REQUESTS = f"{PRIVATE}/requests"
ACTIONS = f"{PRIVATE}/actions"
RUNNING = f"{PRIVATE}/running"
COMMANDS = f"{PRIVATE}/commands"
DRAFTS = f"{PRIVATE}/drafts"
LOGS = f"{PRIVATE}/logs"
EVENTS = f"{PRIVATE}/events"
SNAPSHOT = f"{PRIVATE}/snapshot.json"
SAVE_NOW = f"{PRIVATE}/save-now.json"
PARTS = f"{PRIVATE}/parts"
ELECTIONS = f"{PRIVATE}/elections"
PROBES = f"{PRIVATE}/probes"
STAGING = f"{PRIVATE}/staging"
TRASH = f"{PRIVATE}/trash"
QUARANTINE = f"{PRIVATE}/quarantine"
HUB = f"{PRIVATE}/hub"
TAKEN = f"{PRIVATE}/taken"

BUCKETS = "hf://buckets/"
"""How buckets on the Hub begin: stores of files, where `hf://org/repo` has commits."""
STEP_PREFIX = "step-"
"""How the name of every checkpoint's folder begins, and maybe somebody else's."""
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_SET_ASIDE = re.compile(r"step-(0|[1-9][0-9]*)\.([0-9a-zA-Z]+)")
_RANK = re.compile(r"__([0-9]+)_")
_SHARD = re.compile(r"__[0-9]+_([0-9a-zA-Z]+)_[0-9]+\.distcp")
_READER = re.compile(r"(0|[1-9][0-9]*)\.([0-9a-f]+)\.json")
_PART_NOTE = re.compile(r"([0-9a-f]+)/[^/]+\.json")
_DRAFT = re.compile(r"([0-9a-zA-Z]+)\.json")
_TOKEN = 12
"""Characters of a save id that name its trainer; the number of its save follows."""
_ATTEMPT = re.compile(r"([0-9a-f]+)-a([1-9][0-9]*)\.json")
_LOG = re.compile(r"([0-9a-f]+)-a[0-9]+\.log")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PIN = re.compile(rf"ray_ckpt\.pin\.({_WORD.pattern})\.json")


def is_repository(uri: str) -> bool:
    """Whether it is a repository on the Hub.

    >>> is_repository("hf://org/repo"), is_repository("hf://buckets/org/name/run")
    (True, False)
    """
    return uri.startswith("hf://") and not uri.startswith(BUCKETS)


def step_dir(step: int) -> str:
    """Folder of a checkpoint.

    >>> step_dir(500)
    'step-500'
    """
    return f"step-{step}"


def parse_step(name: str) -> int | None:
    """Step of the folder called `name`, or None if it is not a step folder.

    The whole name must be what :func:`step_dir` writes, so that leftovers and other people's
    spellings are never taken for checkpoints.

    >>> parse_step("step-500"), parse_step("step-0500"), parse_step("old-step-500")
    (500, None, None)
    """
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def export_dir(name: str, step: int) -> str:
    """Folder of one export of one step."""
    return f"{EXPORTS}/{name}/{step_dir(step)}"


def pointer_key(name: str, pointer: str) -> str:
    """Key of what leads to one of the copies of an export."""
    return f"{EXPORTS}/{name}/{pointer}"


def is_word(name: str) -> bool:
    """Whether `name` may be part of a key: letters, digits, `.`, `_`, `-`; no step, not hidden."""
    return _WORD.fullmatch(name) is not None and parse_step(name) is None


def hub_key(repository: str) -> str:
    """What is still to be removed from a repository on the Hub, `org/name`."""
    return f"{HUB}/{repository}.json"


def taken_key(folder: str) -> str:
    """Key of the note that a folder of others, directly in the root, has become a step once."""
    return f"{TAKEN}/{folder}.json"


def manifest_key(folder: str) -> str:
    """Key of the manifest of a checkpoint or an export."""
    return f"{folder}/{MANIFEST}"


def pin_key(step: int, name: str) -> str:
    """Key of a pin; `name` says who or what pins."""
    return f"{step_dir(step)}/ray_ckpt.pin.{name}.json"


def parse_pin(file_name: str) -> str | None:
    """Name of the pin held by the file called `file_name`, or None if it is no pin."""
    match = _PIN.fullmatch(file_name)
    return match[1] if match else None


def set_aside_dir(parent: str, step: int, save_id: str) -> str:
    """Folder in the trash or the quarantine for one save of one step."""
    return f"{parent}/{step_dir(step)}.{save_id}"


def parse_set_aside(name: str) -> tuple[int, str] | None:
    """Step and save id of a folder in the trash or the quarantine, or None."""
    match = _SET_ASIDE.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def is_save_id(text: str) -> bool:
    """Whether `text` may name a save: what else it could be would leave its folder."""
    return re.fullmatch(r"[0-9a-zA-Z]+", text) is not None


def save_id(token: str, number: int) -> str:
    """Names save number `number` of the trainer that `token` names.

    >>> save_id("0123456789ab", 7)
    '0123456789ab0007'
    """
    assert len(token) == _TOKEN, "so that a trainer knows its own saves"
    return f"{token}{number:04d}"


def are_of_one_trainer(one: str, other: str) -> bool:
    """Whether two save ids were made by the very same process of training."""
    return one[:_TOKEN] == other[:_TOKEN]


def save_attempt(save_id: str) -> str:
    """What an attempt to save is called, at the root and on every node."""
    return f"save-{save_id}"


def gather_attempt(save_id: str) -> str:
    """What the attempt to bring a staged save is called: no trainer sweeps it."""
    return f"gather-{save_id}"


def draft_key(save_id: str) -> str:
    """Key of a save that lies on its nodes."""
    return f"{DRAFTS}/{save_id}.json"


def ended_key(save_id: str) -> str:
    """Key of what became of it."""
    return f"{DRAFTS}/{save_id}.ended.json"


def parse_draft(key: str) -> str | None:
    """Save id of the draft under `key`, or None if that is none."""
    match = _DRAFT.fullmatch(key.removeprefix(f"{DRAFTS}/"))
    return match[1] if match else None


def shard_prefix(rank: int, save_id: str) -> str:
    """How names of a rank's shards begin that no other save of the step uses.

    >>> shard_prefix(3, "a1") + "0.distcp"
    '__3_a1_0.distcp'
    """
    return f"__{rank}_{save_id}_"


def rank_of_shard(name: str) -> int | None:
    """Which rank wrote the shard, ours or torch's; None for any other file.

    >>> rank_of_shard("__3_a1_0.distcp"), rank_of_shard("__12_0.distcp"), rank_of_shard("a.json")
    (3, 12, None)
    """
    match = _RANK.match(name)
    return int(match[1]) if match else None


def save_of_shard(name: str) -> str | None:
    """Save id in the name of a shard; None for any other file, also for torch's `__0_0.distcp`."""
    match = _SHARD.fullmatch(name)
    return match[1] if match else None


def staging_dir(attempt: str) -> str:
    """Private folder of one attempt to save or export."""
    return f"{STAGING}/{attempt}"


def export_attempt(export_id: str) -> str:
    """Name of an attempt to export; several attempts at the same export share it."""
    return f"export-{export_id}"


def parts_dir(export_id: str) -> str:
    """Folder of the notes about finished files of an export."""
    return f"{PARTS}/{export_id}"


def part_note(export_id: str, file: str) -> str:
    """Key of the note about one finished file."""
    return f"{parts_dir(export_id)}/{file}.json"


def parse_part_note(key: str) -> str | None:
    """Id of the export whose note lies under `key`, or None."""
    match = _PART_NOTE.fullmatch(key.removeprefix(f"{PARTS}/"))
    return match[1] if match else None


def begun_key(folder: str) -> str:
    """Key that tells the remains of our own save in `folder` from somebody else's files."""
    return f"{STAGING}/{folder}.begun"


def attempt_of(folder: str) -> str:
    """What an attempt on an object store is called, by the folder that it was to fill.

    >>> attempt_of("step-5"), attempt_of("exports/hf/step-5")
    ('save-step-5', 'export-hf-step-5')
    """
    if parse_step(folder) is not None:
        return f"save-{folder}"
    return f"export-{folder.removeprefix(f'{EXPORTS}/').replace('/', '-')}"


def is_save(attempt: str) -> bool:
    """Whether an attempt of this name is a trainer's."""
    return attempt.startswith("save-")


def is_copy(attempt: str) -> bool:
    """Whether an attempt of this name is to publish something here."""
    return attempt.startswith("publish-")


def parse_begun(key: str) -> str | None:
    """Folder of the unfinished save or export that the note under `key` tells of, or None."""
    if not (key.startswith(f"{STAGING}/") and key.endswith(".begun")):
        return None
    return key.removeprefix(f"{STAGING}/").removesuffix(".begun")


def reader_key(step: int, token: str) -> str:
    """Key of the heartbeat of one reader of a step."""
    return f"{READERS}/{step}.{token}.json"


def parse_reader(key: str) -> int | None:
    """Step that is read by the one whose heartbeat lies under `key`, or None."""
    match = _READER.fullmatch(key.removeprefix(f"{READERS}/"))
    return int(match[1]) if match else None


def retired_key(folder: str) -> str:
    """Key of the manifest of a copy in `folder` that somebody has begun to remove."""
    return f"{STAGING}/{folder}.retired"


def action_key(key: str) -> str:
    """Key of the record of one action."""
    return f"{ACTIONS}/{key}.json"


def running_key(key: str, attempt: int) -> str:
    """Key of the heartbeat of attempt number `attempt` of an action."""
    return f"{RUNNING}/{key}-a{attempt}.json"


def parse_running(key: str) -> tuple[str, int] | None:
    """The action's key and the attempt whose heartbeat lies under `key`, or None."""
    match = _ATTEMPT.fullmatch(key.removeprefix(f"{RUNNING}/"))
    return (match[1], int(match[2])) if match else None


def request_key(key: str) -> str:
    """Key of one request."""
    return f"{REQUESTS}/{key}.json"


def command_key(verb: str, key: str) -> str:
    """Key of a command about the action of that key; giving it twice is giving it once."""
    return f"{COMMANDS}/{verb}-{key}.json"


def log_key(key: str, attempt: int) -> str:
    """Key of what attempt number `attempt` of an action said when it failed."""
    return f"{LOGS}/{key}-a{attempt}.log"


def parse_log(key: str) -> str | None:
    """Key of the action whose log lies under `key`, or None."""
    match = _LOG.fullmatch(key.removeprefix(f"{LOGS}/"))
    return match[1] if match else None


def event_key(at: str, who: str, batch: str) -> str:
    """Key of one batch of events, by the time of its last one: names sort by time, then by writer.

    >>> event_key("2026-11-22T15:45:40.120+00:00", "manager epoch 7", "c0ffee")
    '.ray_ckpt/events/20261122T154540.120Z-manager-epoch-7-c0ffee.jsonl'
    """
    writer = re.sub(r"[^A-Za-z0-9_.]+", "-", who)[:64]
    return f"{EVENTS}/{event_time(at)}-{writer}-{batch}.jsonl"


def event_time(at: str) -> str:
    """A UTC time in ISO 8601 as the names of batches begin with it."""
    return at.removesuffix("+00:00").replace("-", "").replace(":", "") + "Z"


def election_dir(election: str) -> str:
    """Folder of the claims of those who are about to create one object."""
    return f"{ELECTIONS}/{election}"


def store_key(endpoint: str) -> str:
    """Key of what is known of the store that answers at this address."""
    return f"{PRIVATE}/store-{hashlib.sha256(endpoint.encode()).hexdigest()[:8]}.json"


def lease_key(role: str, epoch: int) -> str:
    """Key of one epoch of a lease."""
    return f"{LEASES}/{role}-{epoch}.json"


def parse_lease(file_name: str) -> tuple[str, int] | None:
    """Role and epoch of a lease file, or None."""
    role, _, epoch = file_name.removesuffix(".json").rpartition("-")
    return (
        (role, int(epoch)) if role and epoch.isdecimal() and file_name.endswith(".json") else None
    )


def run_name(root: str) -> str:
    """Short name of the run at `root`: readable first, unique by a digest of the whole location.

    >>> run_name("s3://bucket/llama-8b")
    'llama-8b-873547'
    """
    location = root.rstrip("/")
    tail = re.sub(r"[^A-Za-z0-9_.-]", "-", location.rpartition("/")[2]) or "root"
    return f"{tail}-{hashlib.sha256(location.encode()).hexdigest()[:6]}"


def manager_name(root: str) -> str:
    """Name of the actor that manages `root`."""
    return f"ray_ckpt:{run_name(root)}"
