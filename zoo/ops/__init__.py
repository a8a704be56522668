"""Pure functions, one file per recurrence, each with a step-by-step `reference` and a fast `chunked` form.

The file of an op is `_NAME.py`, since `zoo.ops.NAME` is the function. What mixers share besides the ops is in `common`,
`derivatives` and `modules`; kernels in C++ are declared by `kernel` and `bridge`.
"""

from zoo.ops._attention import attention
from zoo.ops._block_attention import BlockCache, block_attention
from zoo.ops._causal_conv1d import causal_conv1d
from zoo.ops._cfc import CFC_ACTIVATIONS, cfc, cfc_by_steps
from zoo.ops._delta_rule import delta_rule
from zoo.ops._dplr import dplr
from zoo.ops._gated_mlp import constant_weights, gated_mlp
from zoo.ops._gated_norm import gated_norm
from zoo.ops._latent_attention import LatentCache, latent_attention
from zoo.ops._linear_attention import linear_attention
from zoo.ops._long_conv import ConvHistory, init_history, long_conv
from zoo.ops._ltc import Synapses, ltc
from zoo.ops._m2rnn import m2rnn
from zoo.ops._mlstm import MLSTMState, mlstm
from zoo.ops._normed_product import normed_product
from zoo.ops._oscillate import oscillate
from zoo.ops._plain_norm import plain_norm
from zoo.ops._scan import scan
from zoo.ops._selective_scan import selective_scan
from zoo.ops._silu_product import silu_product
from zoo.ops._slot_scores import slot_scores
from zoo.ops._slstm import SLSTMState, slstm
from zoo.ops._sparse_latent_attention import SparseChoice, SparseIndex, SparseLatentCache, sparse_latent_attention
from zoo.ops._token_shift import token_shift
from zoo.ops._ttt import InnerState, ttt
from zoo.ops.grouped import grouped_feed_forward, grouped_linear
from zoo.ops.kv_cache import DecayingCache, KVCache, init_cache, init_decaying_cache
from zoo.ops.rotary import RopeScaling, frequencies, rotary_table, rotary_width, rotate, yarn_amplitude

__all__ = [
    "CFC_ACTIVATIONS",
    "BlockCache",
    "ConvHistory",
    "DecayingCache",
    "InnerState",
    "KVCache",
    "LatentCache",
    "MLSTMState",
    "RopeScaling",
    "SLSTMState",
    "SparseChoice",
    "SparseIndex",
    "SparseLatentCache",
    "Synapses",
    "attention",
    "block_attention",
    "causal_conv1d",
    "cfc",
    "cfc_by_steps",
    "constant_weights",
    "delta_rule",
    "dplr",
    "frequencies",
    "gated_mlp",
    "gated_norm",
    "grouped_feed_forward",
    "grouped_linear",
    "init_cache",
    "init_decaying_cache",
    "init_history",
    "latent_attention",
    "linear_attention",
    "long_conv",
    "ltc",
    "m2rnn",
    "mlstm",
    "normed_product",
    "oscillate",
    "plain_norm",
    "rotary_table",
    "rotary_width",
    "rotate",
    "scan",
    "selective_scan",
    "silu_product",
    "slot_scores",
    "slstm",
    "sparse_latent_attention",
    "token_shift",
    "ttt",
    "yarn_amplitude",
]
