"""Low rank without training: plain, by activations, by Fisher information."""

from collections.abc import Mapping

from jaxcompress._src.lowrank.factorize import Whitening
from jaxcompress._src.lowrank.leaves import LowRankInfo, factored
from jaxcompress._src.lowrank.ranks import RankRule
from jaxcompress._src.lowrank.targets import Weighting, activation_targets, fisher_targets, plain_targets
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import Params, Selector


@on_auto_axes
def svd(
    params: Params,
    *,
    rank: int | Mapping[str, int | None] | RankRule,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LowRankInfo]]:
    """The closest factors in the Frobenius norm: W' = U_k Σ_k V_kᵀ.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        rank: one for all leaves, by path, or a rule: `parameter_share`, `energy`, `budget`. A stack has one rank.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out). Inputs and outputs with several axes
            count as one each; stack entries are factored one by one.

    Returns:
        `(params, info)`: a `LowRankArray` for every selected leaf, but for those that the rule leaves dense, and a
        `LowRankInfo` for each of them by path (`path[i]` for each entry of a stack). Factors have the dtype of the
        leaf, and are trainable.

    Raises:
        ValueError: nothing is selected; a selected leaf is no float array, or holds NaN or Inf; what the rule finds.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "bias": jnp.zeros(2)}
        >>> small, info = svd(params, rank=1)
        >>> small["kernel"].rank, info["kernel"].loss
        (1, 1.0)
    """
    targets = plain_targets(params, select=select, layouts=layouts)
    return factored(params, targets, rank)


@on_auto_axes
def activation_svd(
    params: Params,
    statistics: Params,
    *,
    rank: int | Mapping[str, int | None] | RankRule,
    fisher: Params | None = None,
    damping: float = 0.0,
    ridge: float = 0.1,
    whitening: Whitening = "cholesky",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LowRankInfo]]:
    """The factors whose outputs come closest: min ||X W - X W'||, and the loss of dropping σ_i is σ_i² exactly.

    The σ are the singular values of A W, with Aᵀ A = XᵀX. With `fisher`, the outputs weigh what the diagonal Fisher
    information says: c_j = Σ_i F_ij / tr(XᵀX), so that XᵀX ⊗ c approximates F, and losses compare across leaves.

    Where the statistics have `cross` (inputs Y in the dense model against those X in the compressed one), the target is
    the weights that come closest to the dense outputs on the inputs that the leaf will really get,

        T = argmin ||X T - Y W||² + ridge mean(diag XᵀX) ||T - W||².

    A table that is looked up weighs its rows by how often that happened, plus one.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        statistics: from `calibration.input_statistics`, with "gram".
        rank: one for all leaves, by path, or a rule: `parameter_share`, `energy`, `budget`. A stack has one rank.
        fisher: from `calibration.fisher`, or any tree of weights of that shape, at least 0.
        damping: λ mean(diag) is added to the diagonal of XᵀX. Where that is singular, "cholesky" needs 1e-6 or so, and
            takes it.
        ridge: how much T is held to W, at least 0; the rows must tell more than noise about it. Without `cross`,
            T = W.
        whitening: how A is found; see `root_of_gram`. The factors are the same but for the damping; "eigen" costs
            several times as much.
        select: which leaves; by default all that have such statistics.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out). Several axes count as one.

    Returns:
        As `svd`.

    Raises:
        ValueError: as `svd`; a leaf without statistics, or with statistics of another width; NaN or Inf in them, or a
            negative `fisher`. Names the leaf.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
        >>> x = jnp.array([[0.0, 5.0], [0.1, 0.0]])
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(x,)])
        >>> small, info = activation_svd(params, statistics, rank=1)
        >>> abs(small["kernel"].materialize().round(3)).tolist(), round(info["kernel"].loss, 3)
        ([[0.0, 0.0], [0.0, 1.0]], 0.09)

    References:
        Wang et al. 2024, "SVD-LLM: truncation-aware singular value decomposition for large language model compression",
        section 3.1; Yuan et al. 2023, "ASVD", for the idea.
    """
    targets = activation_targets(
        params,
        statistics,
        fisher=fisher,
        damping=damping,
        ridge=ridge,
        whitening=whitening,
        select=select,
        layouts=layouts,
    )
    return factored(params, targets, rank)


@on_auto_axes
def fisher_svd(
    params: Params,
    fisher: Params,
    *,
    rank: int | Mapping[str, int | None] | RankRule,
    weighting: Weighting = "inputs",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LowRankInfo]]:
    """The closest factors in a norm weighted by the Fisher information F, summed over rows or columns.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        fisher: from `calibration.fisher`, at least 0.
        rank: one for all leaves, by path, or a rule: `parameter_share`, `energy`, `budget`. A stack has one rank.
        weighting: "inputs": Σ_j F_ij for input i, as in the paper. "outputs": Σ_i F_ij for output j. "both": their
            product over Σ F, the closest product of the two.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out). Several axes count as one.

    Returns:
        As `svd`.

    Raises:
        ValueError: as `svd`; a leaf without an entry in `fisher`, or one of another shape, or one that is not finite or
            negative. Names the leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
        >>> small, _ = fisher_svd(params, {"kernel": jnp.array([[0.0, 1e-4], [1.0, 1.0]])}, rank=1)
        >>> abs(small["kernel"].materialize().round(3)).tolist()
        [[0.0, 0.0], [0.0, 1.0]]

    References:
        Hsu et al. 2022, "Language model compression with weighted low-rank factorization", section 3.
    """
    targets = fisher_targets(params, fisher, weighting=weighting, select=select, layouts=layouts)
    return factored(params, targets, rank)
