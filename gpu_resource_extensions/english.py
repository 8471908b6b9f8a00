"""The English counterpart of each Japanese text; loaded only for ``GPU_RESOURCE_LANG=en``."""

ENGLISH: dict[str, str] = {}
