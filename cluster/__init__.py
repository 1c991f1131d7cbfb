"""Where work runs: Ray, engine actors, the pool that feeds them, DeepSpeed and the training worker group. Knows nothing of policies.

Ray reads its security settings when it is imported, so they are set here, before any module of this package can import it.
"""

import os
import secrets


def _secure_local_ray() -> None:
    """A Ray that this process starts listens on loopback and asks for a token; a cluster named by `RAY_ADDRESS` has its own settings."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on Linux: bind to loopback, not to every interface
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


_secure_local_ray()
