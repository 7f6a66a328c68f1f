"""The tutorial's script as a user would run it, imports and all: ``python -m bench.script``."""

from bench import training
from initflow.training import datasets, trainer


def main() -> None:
    splits = datasets.load(training.CONFIG)
    orders = [
        trainer.batch_order(len(splits.train), training.CONFIG.seed, epoch)
        for epoch in range(training.CONFIG.epochs)
    ]
    training.usual(training.start_of(splits).state(), orders)


if __name__ == "__main__":
    main()
