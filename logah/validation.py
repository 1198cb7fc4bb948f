"""Networks that are never trained on, predicted and tested while the hypernetwork trains."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from common.seeding import derive_seed, generator
from common.trainer import TrainState
from logah.architecture_sets import ArchitectureSource
from logah.data import TrainingData
from logah.networks import Network, build_network
from logah.objective import ranks, run_network, scored
from logah.prediction import predict, use_batch_statistics

if TYPE_CHECKING:
    from logah.config import TrainConfig

PURPOSE = "networks for tests"


class Validation:
    """Hook that predicts ``training.valid_nets`` fixed networks with averaged weights and runs them on the validation
    data; every process takes its share of the networks."""

    at_end = True

    def __init__(
        self, config: "TrainConfig", source: ArchitectureSource, data: TrainingData, steps_per_epoch: int
    ) -> None:
        self.config, self.data = config, data
        self.every_steps = config.training.valid_epoch * steps_per_epoch
        self.source = source
        self._networks: list[Network] | None = None

    def networks(self, model: nn.Module, rank: int, world_size: int) -> list[Network]:
        """This process's networks, in eval mode."""
        if self._networks is None:
            chosen = range(self.config.training.valid_nets)[rank::world_size]
            drawn = [self.source.draw(step, [0])[0] for step in chosen]
            self._networks = [build_network(one, model.config, seed=self.config.seed) for one in drawn]
            for network in self._networks:
                use_batch_statistics(network.module.eval())
        return self._networks

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        parallel = state.parallel
        nats = correct = counted = 0.0
        with state.eval_model() as model:
            for number, network in enumerate(self.networks(model, parallel.rank, parallel.world_size)):
                noise = None
                if model.config.class_token_noise:
                    noise = [generator(self.config.seed, PURPOSE, number * parallel.world_size + parallel.rank)]
                found = predict(model, [network.graph], [network.plan], generators=noise)
                values = network.values(found.parameters[0], state.device)
                for batch in self.data.validation_batches():
                    batch = {name: value.to(state.device) for name, value in batch.items()}
                    logits, labels = scored(run_network(network.module, values, batch), batch)
                    nats += float(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
                    correct += float((ranks(logits, labels) == 0).sum())
                    counted += len(labels)
        nats, correct, counted = parallel.sum([nats, correct, counted])
        return {"valid/task_loss": nats / counted, "valid/top1": correct / counted}


def validation_source(config: "TrainConfig", data_options: Mapping[str, object]) -> ArchitectureSource:
    """Draws by the law of the training networks, with another seed."""
    return ArchitectureSource(config.nets, seed=derive_seed(config.seed, PURPOSE), data_options=data_options)
