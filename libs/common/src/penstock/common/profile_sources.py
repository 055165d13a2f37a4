"""ProfileSources: the config profiles of all models, from the live configuration, a file and the instances.

Of one model they count in this order: the live configuration's, the file's, the instances'; then, for any
model, the live configuration's and the file's. Each profile is taken whole from the first that has it. What
cannot be used leaves the last that could be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from penstock.common.aibrix_config import InstanceProfiles, read_annotation
from penstock.common.live_config import Document
from penstock.common.model import Instance
from penstock.common.profiles import (
    ANY_MODEL,
    ConfigProfile,
    ModelProfiles,
    ProfileError,
    merged,
    read_document,
    read_file,
)

ADMIN, FILE, INSTANCES = "admin", "file", "instances"
_MAX_READ = 4096
_SHOWN_IDS = 4
MAX_CAUSE = 500

# Why a document cannot be used here, empty if it can.
Check = Callable[[ModelProfiles], str]


class ProfileSources:
    """`faults` is what cannot be used and why, by what it is. Changed by `take_...` alone."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._live: dict[str, ModelProfiles] = {}
        self._versions: dict[str, int] = {}
        self._file: Mapping[str, ModelProfiles] = {}
        self._of_instances: dict[str, ModelProfiles] = {}
        # By the text of the annotation; what cannot be used is the fault's text.
        self._read: dict[str, InstanceProfiles | str] = {}
        self._faults: dict[str, dict[str, str]] = {ADMIN: {}, FILE: {}, INSTANCES: {}}

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong at present."""
        return {what: cause[:MAX_CAUSE] for one in self._faults.values() for what, cause in one.items()}

    def models(self) -> dict[str, ModelProfiles]:
        """What counts, by model; ANY_MODEL stands for those that are not named."""
        general = [one[ANY_MODEL] for one in (self._live, self._file) if ANY_MODEL in one]
        names = (self._live.keys() | self._file.keys() | self._of_instances.keys()) - {ANY_MODEL}
        sources = self._live, self._file, self._of_instances
        models = {name: merged([*(one[name] for one in sources if name in one), *general]) for name in names}
        return models | ({ANY_MODEL: merged(general)} if general else {})

    def lengths(self, instance: Instance, profile: str) -> tuple[int, int] | None:
        """Least and most prompt tokens that an instance takes in a profile by its own word."""
        read = self._annotation(instance.config) if instance.config else ""
        return None if isinstance(read, str) else read.takes(profile)

    def take_documents(self, documents: Mapping[str, Document]) -> None:
        """The live configuration's, all of them, by model."""
        faults = self._faults[ADMIN] = {
            what: cause
            for what, cause in self._faults[ADMIN].items()
            if any(what == _of(model, ADMIN) for model in documents)
        }
        for model in self._versions.keys() - documents.keys():
            del self._versions[model]
            self._live.pop(model, None)
        for model, document in documents.items():
            if self._versions.get(model) == document.version:
                continue
            self._versions[model] = document.version
            try:
                self._live[model] = self._usable(document.value)
                faults.pop(_of(model, ADMIN), None)
            except ProfileError as exc:
                faults[_of(model, ADMIN)] = f"version {document.version}: {exc}"

    def take_file(self, data: bytes | str) -> list[tuple[str, str]]:
        """The file's content, or in words why there is none: which models changed, and how."""
        try:
            if isinstance(data, str):
                raise ProfileError(data)
            models = read_file(data)
            faults = [f"{model}: {fault}" for model, one in models.items() if (fault := self._check(one))]
            if faults:
                raise ProfileError("\n".join(faults))
        except ProfileError as exc:
            self._faults[FILE] = {"the profiles file": str(exc)}
            return []
        before, self._file = self._file, models
        self._faults[FILE] = {}
        changed = [(model, "deleted") for model in sorted(before.keys() - models.keys())]
        for model in sorted(models):
            if before.get(model) != models[model]:
                changed.append((model, "updated" if model in before else "created"))
        return changed

    def take_instances(self, instances: Iterable[Instance]) -> bool:
        """The annotations of all instances; whether anything changed."""
        said: dict[str, dict[str, InstanceProfiles]] = {}
        faults: dict[str, str] = {}
        for instance in sorted((one for one in instances if one.config), key=lambda one: one.id):
            read = self._annotation(instance.config)
            for model in (*instance.models, *instance.lora_adapters):
                if isinstance(read, str):
                    faults.setdefault(_of(model, INSTANCES), f"instance {instance.id}: {read}")
                else:
                    said.setdefault(model, {})[instance.id] = read
        chosen = {model: self._chosen(model, by, faults) for model, by in said.items()}
        before = self._of_instances, self._faults[INSTANCES]
        self._of_instances, self._faults[INSTANCES] = chosen, faults
        return before != (chosen, faults)

    def _chosen(
        self, model: str, said: Mapping[str, InstanceProfiles], faults: dict[str, str]
    ) -> ModelProfiles:
        """What most instances say, of equally many the one with the lowest id; prompt lengths aside, which
        are each instance's own."""
        texts = {instance: one.text for instance, one in said.items()}
        most, _ = Counter(texts.values()).most_common(1)[0]
        agreed = next(instance for instance, text in texts.items() if text == most)
        others = [instance for instance, text in texts.items() if text != most]
        if others:
            shown = ", ".join(others[:_SHOWN_IDS]) + (", ..." if len(others) > _SHOWN_IDS else "")
            faults[_of(model, INSTANCES)] = (
                f"{len(others)} of {len(said)} instances disagree ({shown}); what {agreed} says counts"
            )
        return self._without_unknown(model, said[agreed].profiles, faults)

    def _without_unknown(self, model: str, said: ModelProfiles, faults: dict[str, str]) -> ModelProfiles:
        """A profile whose policy there is not decides by the default policy: AIBrix has others as well."""
        if not (fault := self._check(said)):
            return said
        faults.setdefault(_of(model, INSTANCES), fault)
        known: dict[str, ConfigProfile] = {}
        for name, one in said.profiles.items():
            alone = ModelProfiles(profiles={name: one})
            known[name] = one.model_copy(update={"routing_strategy": None}) if self._check(alone) else one
        lock = said.locked_routing_strategy
        if self._check(ModelProfiles(locked_routing_strategy=lock)):
            lock = None
        return ModelProfiles(default=said.default, locked_routing_strategy=lock, profiles=known)

    def _usable(self, value: object) -> ModelProfiles:
        document = read_document(value)
        if fault := self._check(document):
            raise ProfileError(fault)
        return document

    def _annotation(self, text: str) -> InstanceProfiles | str:
        read = self._read.get(text)
        if read is None:
            try:
                read = read_annotation(text)
            except ProfileError as exc:
                read = str(exc)
            if len(self._read) >= _MAX_READ:
                self._read.clear()
            self._read[text] = read
        return read


def _of(model: str, source: str) -> str:
    return f"profiles of {model} ({source})"
