"""One module a kind of file. A new kind is a new module with a FAMILY, and its line here."""

from tests.golden.families import (
    fla,
    lact,
    mttt_linear_attention,
    mttt_model,
    mttt_self_attention,
    mttt_ttt,
    titans,
    tttlm,
    tttlm_block,
    vittt,
)

FAMILIES = [
    mttt_linear_attention.FAMILY,
    mttt_self_attention.FAMILY,
    mttt_ttt.FAMILY,
    mttt_model.FAMILY,
    vittt.FAMILY,
    fla.FAMILY,
    tttlm.FAMILY,
    tttlm_block.FAMILY,
    lact.FAMILY,
    titans.FAMILY,
]
