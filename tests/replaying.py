"""What tests of replays share: small networks trained without tracking, and their evidence."""

from dataclasses import replace

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import record
from initflow.experiments.replay import provenance
from initflow.initializers.plugins import find
from initflow.training import datasets

QUICK = {
    "dataset": "digits",
    "hidden": "12,8",
    "epochs": 2,
    "eval_every": 5,
    "probe": 0,
    "threads": 1,
}


def config(**own):
    return TrainConfig(**QUICK | own)


def trained(*configs, change=lambda _: None, give_up=lambda *_: False, tested=True):
    """A record of each of ``configs``, trained as one stack, and their images."""
    with machine.threads(1):
        splits = datasets.load(configs[0])
        splits = splits if tested else splits.untested()
        schemes = [find(one.init, one.plugins_dir) for one in configs]
        pairs = zip(configs, schemes, strict=True)
        records = [record.start(one, scheme, splits) for one, scheme in pairs]
        for one in records:
            change(one)
        record.train_together(records, splits, should_stop=give_up)
    return records, splits


def evidence(*configs, member=0, **options):
    """That of one of the networks of a stack."""
    records, splits = trained(*configs, **options)
    with machine.threads(1):
        return provenance.of(records[member], splits, machine.Resolved("cpu", 1))


def reader(files):
    """How ``files``, by name, are read; what is larger than asked for is not."""

    def read(name, limit):
        content = files.get(name)
        assert content is None or len(content) <= limit
        return content

    return read


def stated(kept, **own):
    """The evidence with other facts in its provenance."""
    return replace(kept, provenance=replace(kept.provenance, **own))


def elsewhere(kept):
    """As if it had been trained where sums are rounded differently."""
    told = kept.provenance.environment
    facts = told["facts"] | {"cpu_capability": "AVX1024"}
    return stated(kept, environment=told | {"facts": facts})
