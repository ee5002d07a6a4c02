"""What settings must hold, said in one line that names the setting, its value and the fix."""

from typing import Any


def require(holds: bool, setting: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"{setting}={value}: {fix}")


def at_least(section: str, cfg: Any, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(cfg, name)
        fix = f"must be {bound} or more"
        setting = f"{section}.{name}" if section else name
        require(value is None or value >= bound, setting, value, fix)
