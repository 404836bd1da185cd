"""What an SGLang worker does with the steps of a round (see `inference_plugins.gated`)."""

from __future__ import annotations

from inference_plugins.gated import GatedLoader


class SglangLoader(GatedLoader):
    """An SGLang worker's."""

    start_setting = "CPE_SGLANG_START"

    def sleep(self, seconds: float) -> None:
        """The memory of its weights is about to be given away: nothing is written from now on."""
        self._tell(serving=False)
        self.asleep = True

    def wake_up(self, *, kept: bool) -> None:
        """Weights that were not kept are as good as a mixture, and so is what no version brings."""
        self.asleep = False
        if not kept:
            self.touched, self.failure = True, "it slept, and its weights were not kept"
            self._learned.forget(self.failure)
