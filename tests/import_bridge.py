"""Imports Megatron-Bridge on a CPU: for the fork server of warm.py."""

from nemo_kd.bridge import cpu_backend

cpu_backend.enable()

import nemo_kd.bridge.dataset  # noqa: E402
import nemo_kd.bridge.dump  # noqa: E402
import nemo_kd.bridge.forward_step  # noqa: E402
import nemo_kd.bridge.models  # noqa: E402
import nemo_kd.bridge.train  # noqa: E402, F401
