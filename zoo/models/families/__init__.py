"""Published architectures as presets: a pattern, sizes and the weight map of each, one file a family."""

from zoo.models.published.family import Families, Family, families

__all__ = ["Families", "Family", "families"]
