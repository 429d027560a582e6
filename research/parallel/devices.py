"""The devices of this process; on a CPU, as many virtual devices as are required."""

import jax

from layers.config import ConfigError


def first_devices(count: int) -> list:
    """The first ``count`` devices: accelerators if there are any, else virtual CPU devices.

    The number of virtual CPU devices is fixed when JAX initialises its backend. If that has not
    happened yet, this call sets the number; afterwards the process cannot change it.

    Raises:
      ConfigError: there are fewer than ``count``.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend is initialised already
        pass
    devices = jax.devices()
    if len(devices) < count:
        on_cpu = devices[0].platform == "cpu"
        hint = f"XLA_FLAGS=--xla_force_host_platform_device_count={count} on the CPU"
        hint = hint if on_cpu else "JAX_PLATFORMS=cpu for virtual ones"
        raise ConfigError(f"devices={count}: this process has {len(devices)}; set {hint}")
    return devices[:count]
