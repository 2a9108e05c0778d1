"""Ray's trainer with as few processes of Ray's own as a command needs.

Its controller starts them one after the other, and each imports for seconds (2-core Zen 4, 2026-11). No setting leaves
them out.
"""

from typing import Any

from ray.train import Result
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.torch.torch_trainer import TorchTrainer

from catsdogs.start import on_existing_cluster


class Trainer(TorchTrainer):
    """Ray's, but for the processes that have nothing to do in a command.

    One shares the trainer's datasets out: ours are the workers'. One frees what a controller that was killed had
    reserved: that goes with the command, which waited 12 s at its end, Ctrl-C too, for that process. One asks for
    machines: there are none to be had where Ray is the command's own.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        if not on_existing_cluster():
            arguments["scaling_policy"] = _ask_nobody(arguments["scaling_policy"])
        return super()._initialize_and_run_controller(**arguments)


def _ask_nobody(policy: ScalingPolicy) -> ScalingPolicy:
    """Make a policy of as many workers that asks no autoscaler for machines."""

    class AskNobody(FixedScalingPolicy):  # in here it is sent by value: the controller need not import this package
        def after_controller_start(self, *_: object) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return AskNobody(policy.scaling_config)
