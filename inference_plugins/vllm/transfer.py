"""The weight transfer engine ``cpe`` of a vLLM worker: its link to the daemon, from the end of loading on.

vLLM makes one in every worker when the model has been loaded, before the server takes requests. A thread of its own
talks to the daemon as long as the worker lives; vLLM's thread only waits in ``update_weights`` while that one loads.
All that happens in an update is told over the link, so nothing is ever raised across vLLM's own calls between
processes: these would end the server.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, Final

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from cpe_daemon.errors import DeadlineError
from cpe_daemon.wire.messages import WorkerHello
from inference_plugins.gate import Gate
from inference_plugins.gated import Reloading
from inference_plugins.introduction import introduce
from inference_plugins.learned import LearnedLoading, switched_on, tensors_of
from inference_plugins.receiver import Receiver
from inference_plugins.vllm.benches import ModelBenches
from inference_plugins.vllm.compat import (
    check_version,
    draft_model,
    layerwise,
    let_sessions_lapse,
    pack_experts_again,
)
from inference_plugins.vllm.loader import VllmLoader
from inference_plugins.vllm.parts import DRAFT, Draft, Target
from inference_plugins.vllm.ranks import place
from inference_plugins.vllm.refusals import check_supported
from inference_plugins.vllm.reload import Reload
from inference_plugins.vllm.settings import Settings
from inference_plugins.vllm.snapshot import shapes

log: Final = logging.getLogger(__name__)

KIND: Final = "vllm"
_CLOSE_SECONDS: Final = 5.0
_ANNOUNCE_SECONDS: Final = 60.0
"""For a round that this engine takes no part in, as nobody knew where its API is."""


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """What the engine's own process says, if anything; ``url``: where its API is (`inference_plugins.vllm.attach`)."""

    url: str = ""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What the daemon's driver says in ``update_weights``; ``seconds``: how long the update may take."""

    seconds: float = 0.0


class CpeWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Takes versions from the daemon of this node. Made by vLLM, in the thread that runs the model.

    Raises:
        EngineError: this vLLM, or what it was told to do, cannot be updated safely; says why.
        DeadlineError: it was to start with a version of the daemon's, and none came in time.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config: Any, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        check_version()
        check_supported(vllm_config)
        self._settings = Settings.read()
        let_sessions_lapse(CpeWeightTransferEngine)
        self._layerwise = layerwise()
        benches = ModelBenches(model, self._layerwise)
        self._learned = LearnedLoading(lambda: tensors_of(model), on=switched_on(), benches=benches)
        spared = lambda: self._learned.modules  # noqa: E731  # asked for in each round
        self._target = Reload(model, vllm_config.model_config, self._layerwise, spared=spared, benches=benches)
        self._models: list[Reloading] = [Target(self._target)]
        self._shapes = shapes(vllm_config.model_config, vllm_config.load_config)
        self._add(model)
        if (draft := draft_model()) is not None:
            self._add_draft(*draft)
        self._gate = Gate("vLLM")
        self._loader = VllmLoader(
            lambda: self._models,
            device,
            self._gate,
            needs_version=self._settings.start == "version",
            shapes=self._shapes,
            learned=self._learned,
        )
        self._receiver = Receiver(self._settings.socket, _hello(self._settings, vllm_config, device), self._loader)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="cpe-receiver", daemon=True)
        self._thread.start()
        try:
            with set_current_vllm_config(vllm_config):
                self._start()
        except BaseException:  # task boundary: a worker that does not start leaves nothing behind
            self.shutdown()
            raise

    # --- what vLLM calls ---------------------------------------------------------------------------------------------

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Tell the daemon what it was not told before: the link was made when the worker started."""
        if init_info.url:
            self._receiver.announce(init_info.url, _ANNOUNCE_SECONDS)

    def start_weight_update(self) -> None:
        """Nothing to do yet: the reload begins with the first tensors that come, of the model and its draft alike."""
        if self.model is not self._default_model and len(self._models) == 1:
            self._add_draft(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Stay until the update has ended, however that is; the daemon knows from the link."""
        seconds = self.parse_update_info(update_info).seconds or self._settings.update_seconds
        with set_current_vllm_config(self.vllm_config):
            outcome = self._gate.hold(seconds)
        if outcome != "finished":
            log.warning("an update was not taken: %s", self._loader.failure or outcome)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Not used: `update_weights` does all."""

    def finish_weight_update(self) -> None:
        """Nothing is left to do: the update was completed, or undone, before ``update_weights`` returned."""

    def shutdown(self) -> None:
        """Part from the daemon."""
        self._stopped.set()
        self._receiver.wake()
        self._thread.join(_CLOSE_SECONDS)

    @staticmethod
    def trainer_send_weights(*arguments: Any, **named: Any) -> None:
        """Refuse: trainers publish to the daemon."""
        raise NotImplementedError("trainers publish with cpe_daemon.publisher.Publisher")

    # --- the models --------------------------------------------------------------------------------------------------

    def _add(self, model: torch.nn.Module) -> None:
        if self.device.type == "cpu":
            pack_experts_again(model)

    def _add_draft(self, model: torch.nn.Module, model_config: Any) -> None:
        """Have versions go into the draft model too. What it shares with the model is loaded with that one."""
        apart = model_config.model != self._default_model_config.model
        self._add(model)
        reload = Reload(model, model_config, self._layerwise, self._target.modules)
        self._models.append(Draft(reload, apart=apart))
        if apart:
            found = shapes(model_config, self.vllm_config.load_config)
            self._shapes.update((DRAFT + name, shape) for name, shape in found.items())

    # --- the link ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._receiver.run(self._stopped)
        finally:
            self._receiver.close()

    def _start(self) -> None:
        """Come up with what the settings ask for."""
        seconds = self._settings.start_seconds
        if self._settings.start == "any":
            return
        try:
            self._loader.await_serving(seconds)
        except DeadlineError as error:
            raise DeadlineError(
                f"{error.message}, from the daemon at {self._settings.socket}; CPE_VLLM_START=any serves what was"
                " loaded from disk until one comes"
            ) from None


def _hello(settings: Settings, vllm_config: VllmConfig, device: torch.device) -> WorkerHello:
    return introduce(settings, KIND, f"vllm-{vllm_config.instance_id}", *place(vllm_config.parallel_config), device)
