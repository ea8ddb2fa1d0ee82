"""Differences of presets from their papers and published code. Torch-free.

Where paper and published code disagree, the text says which was taken. All presets share what ``COMMON`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["COMMON", "DIFFERS"]

COMMON = (
    "Of all presets: one calibration for all (256 windows unless given; the papers use 32 to 512 of 2048 tokens), "
    "decompositions in float64 with a damping of 1e-6 of the mean eigenvalue instead of a Cholesky that is repeated with a larger "
    "diagonal, only the decoder blocks' linear layers compressed and counted, and the budget spent to the last rank that fits (but by "
    "`bolaco` and `lems`), where published codes round each matrix down by itself. One-shot: no fine-tuning afterwards, which most of "
    "the papers add."
)
"""Differences common to all presets."""

DIFFERS: Mapping[str, str] = MappingProxyType(
    {
        "bolaco": (
            "Without the search its ranks are the fixed ratios of the paper's LoRD baseline, scaled to the budget. Ranks in multiples "
            "of 8 as in the published code; what that rounding leaves is not handed out, and said where it is more than 1 % of the "
            "budget. Its search follows the published code; that knows LLaMA at 20 and 30 % alone, so the first point of the search is "
            "theirs in rule, not in numbers: attention at 0.5, the rest at the kept fraction, scaled to meet the budget; with fewer "
            "validation windows than its 820 the windows are selected from those that there are. The paper's post-training is a "
            "healing (`--method diagonal`)."
        ),
        "svd": "Uniform kept fractions, as in the papers that use it as their baseline; its own source says nothing of language models.",
        "fwsvd": (
            "The Fisher information is that of labels sampled from the model; the paper takes the labels of a task, on which it also "
            "fine-tunes before and after. A row's weight is the sum over the row, as in the paper."
        ),
        "asvd": (
            "α = ½ and abs_mean scaling, as the published code by default. Sensitivity is the perplexity on 32 calibration windows "
            "(the code's default; the stable-rank estimate of its other option is not offered), on the paper's grid of 0.1 to 0.9, "
            "which the code cut to 0.4 to 0.9 later. The code stops at a whole cut, which may be the first above the nominal ratio, "
            "counts unrounded ratios, and compresses the output head, too; here the last cut is made in part, so that the budget is "
            "met exactly. Exact decompositions, where the code's are randomised (svd_lowrank)."
        ),
        "svd_llm": (
            "Hands out the parameters that the published code floors away (int(m n κ / (m + n)) for each matrix, up to one rank for "
            "each): slightly higher ranks at the same ratio. Whitening by the symmetric root instead of Cholesky's: the same matrix. "
            "Neither the code's later update of U from compressed inputs nor its LoRA stage."
        ),
        "pifa": (
            "Only the storage of the paper, around SVD-LLM's factors, at ranks that spend the budget; `mpifa` is the paper's whole "
            "method. Pivots by the same column-pivoted QR, in float64."
        ),
        "mpifa": (
            "The reconstruction of the published code with the arguments of its README: target of 0.75 x the output from compressed "
            "inputs + 0.25 x the dense output, U refitted and then V, on all calibration windows. The code's own default is a factor of 0 "
            "and one turn. Its V step adds 1e-3 to the summed second moment, here the damping does the same, relative. Its storage "
            "rounds ranks up to multiples of 16 after they were chosen and so ends above the budget (2.5 to 7 % on a small model); "
            "here ranks keep to the budget. OWL's layer-wise densities (MPIFA_NS in the paper) are not offered."
        ),
        "svd_llm_v2": (
            "The ratios of the paper's formula with natural logarithms; a loss below e counts as e, and ratios outside [0, 0.99] are "
            "clipped, of which the paper says nothing. The truncation itself is SVD-LLM's, which two rounds of SVD give as well. No "
            "published code has these ratios."
        ),
        "welore": (
            "Every singular value above one normalised threshold is kept, and a matrix that would cost more than dense stays dense; "
            "the paper calls a matrix low-rank only below half of its full rank, and fine-tunes those alone."
        ),
        "io_svd": (
            "The paper's input-output whitening, with uniform ranks: its greedy choice of ranks by first-order losses and its 8-bit "
            "remapping are not here. The output metric is that of labels sampled from the whole vocabulary instead of the top-k "
            "expansion of the KL, its exponent is one half, and the inputs are centred with a bias that keeps the mean."
        ),
        "lems": (
            "By the paper's formulas: shrinkage of 0.1 and 0.3, per-token gradients clipped to 0.1 to 10 x the mean norm of their "
            "window, an eighth of the positions left out at either end, scales at a tenth of the break-even rank, 10 trials of TPE, "
            "ranks in eights, an exact integer program (by our own dynamic program). Its code was not at hand, and what the formulas "
            "leave open is ours: inputs are not centred, labels are sampled from the model, the mean norm is that of all positions, "
            "the depth bias is 1 in the first block and 0 in the last, the first trial has none and the next three are random, and a "
            "rank below eight stays possible. Scales and trials are measured on all positions of the validation windows, where the "
            "paper leaves out the first 256 of each. As a search (`lowrank search --preset lems`) its trials go by the Lagrangian, and "
            "ranks are rounded down."
        ),
        "modegpt": (
            "The three algorithms of the paper with its sparsities by block influence: Nyström for MLPs, CR for queries and keys, SVD for "
            "values and outputs. No code of the authors was at hand; what the paper leaves open is as in the reproduction at "
            "github.com/cbacary/MoDeGPT: energies of queries and keys are taken before the rotary embedding, which did better there than "
            "after it (the paper's formula), a pair of dimensions has the root of the sum of its two squared scores, over the heads that "
            "share a key, and where heads share a value its directions are those of the value alone. λ of the ridge leverage is 1e-2 of "
            "the mean eigenvalue, there 1e-2 itself; ε is 0.1, there 0.015 to 0.15, with at most 80 % removed from a block. Kept fractions "
            "are of parameters and spend the budget, where the reproduction cuts widths to whole numbers below and ranks of Llamas to even "
            "ones. Values and outputs are stored with the identity in r columns, which saves r² numbers of each group; the numbers of the "
            "pairs that stay are counted, which the paper does not. Dense, with a warning, stay experts, and queries and keys behind a "
            "norm (Qwen3) or an embedding that turns a part of each head by halves (Phi). Without rotary embeddings single dimensions are "
            "kept, as for the paper's OPT models. vLLM does not read these forms."
        ),
        "aa_svd": (
            "The closed form of the paper, matrix by matrix in the order of the model; the refinement of each whole block after it, "
            "which the paper reports to matter most, is not here (a healing by `blockwise` comes near)."
        ),
        "basis_sharing": (
            "Every module type is shared by two neighbouring blocks; the published configurations share q, k, v, up and gate only and "
            "compress o and down by themselves. Second moments are summed over the group as in the code."
        ),
        "data_free": (
            "All matrices that read one input are stacked (q, k and v; gate and up); the paper stacks q with k and gate with up. "
            "Uniform ranks."
        ),
    }
)
"""Preset -> in words, where ours departs."""
