"""Norms: what stands between the mixers by name, one file each, and the functions that mixers normalise with.

A norm of one's own is a file that `ZOO_IMPORT` names: a subclass of `zoo.protocol.Norm` under
`@zoo.norms.register("my_norm")`, after which `model.norm=my_norm` and `gqa(norm="my_norm(option=1)")` are valid.
"""

from zoo.norms.functional import l2_norm, rms_norm
from zoo.norms.gated import GatedRMSNorm
from zoo.norms.make import NORM_EPS, make_norm, register

__all__ = ["NORM_EPS", "GatedRMSNorm", "l2_norm", "make_norm", "register", "rms_norm"]
