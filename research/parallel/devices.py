"""The devices of this process, virtual ones of the CPU where there is nothing else."""

import jax

from layers.config import ConfigError


def first_devices(count: int) -> list[jax.Device]:
    """``count`` devices: accelerators where there are any, else the CPU in ``count`` parts.

    How many parts the CPU has is settled when something first asks JAX for a device. Here it may
    not have been asked yet; a process that needs another number later cannot have it.

    Raises:
      ConfigError: there are fewer.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has been asked
        pass
    found = jax.devices()
    if len(found) < count:
        cpu = found[0].platform == "cpu"
        way = f"XLA_FLAGS=--xla_force_host_platform_device_count={count} on the CPU"
        way = way if cpu else "JAX_PLATFORMS=cpu for virtual ones"
        raise ConfigError(f"devices={count}: this process has {len(found)}; set {way}")
    return found[:count]
