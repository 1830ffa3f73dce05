"""How one task scores one weight.

A criterion is a small function ``(weight, grad) -> score`` on tensors of the weight's shape. It is called once per task
and batch, and the scores of the batches are added up. ``w`` is the effective weight (after existing masks) and ``g``
the gradient of the task's loss on one batch.

========================  =====================  ==========================================================
name                      score                  use it for
========================  =====================  ==========================================================
``snip``, ``taylor``      sum over b of abs(wg)  the paper's saliency; prunes layers very unevenly
``lamp``                  layer_adaptive(abs w)  a strong baseline without labels; equal for all tasks
``magnitude``             abs(w)                 the plain baseline; equal for all tasks
``fisher``                sum of (wg)^2          weights that matter rarely but strongly
``gradient``              sum of abs(g)          growing: what would change the loss if it came back
``authors_pretrained``    w^2 * sum of abs(g)    reproducing the authors' Tiny-Taskonomy runs
``layer_adaptive(...)``   any of them per layer  high sparsity: no layer collapses
``damped(..., e)``        abs(w)^(1-e) * s^e     trained weights: between magnitude (e=0) and s (e=1)
========================  =====================  ==========================================================

The wrappers combine: ``layer_adaptive(damped(taylor, 0.5))``, as reports print them.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import did_you_mean, wrong
from .kinds import check_flag, check_kind
from .sorting import PIECE, squared_shares

ScoreFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A scoring rule, ready to be used by ``score_tasks``.

    Attributes:
        name: What reports and saved files call it.
        score: ``(weight, grad) -> score``, each of the weight's shape.
        summed: Whether the scores of all batches are added up. False for a score that does not depend on the data.
        elementwise: Whether each score depends on its own weight and gradient only; it is then made piece by piece.
        finish: A step on the sum, ``(weight, sum) -> score``, elementwise, or None.
        per_layer: A last step on all alive scores of one layer (1-D in, 1-D out), or None.
    """

    name: str
    score: ScoreFunction
    summed: bool = True
    elementwise: bool = False
    finish: Callable[[Tensor, Tensor], Tensor] | None = None
    per_layer: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_kind("score", self.score, Callable, "a function of weight and gradient")  # type: ignore[arg-type]
        check_flag("summed", self.summed)
        check_flag("elementwise", self.elementwise)

    @property
    def shares(self) -> bool:
        """Whether the scores are shares of their layer already, as :func:`lamp_scores` makes them."""
        return self.per_layer is lamp_scores

    @property
    def may_write(self) -> bool:
        """Whether ``score`` may change its arguments in place: none of this package does."""
        return all(self.score is not own for own in _OWN_SCORES)

    @property
    def has_last_steps(self) -> bool:
        """Whether something is left to be done once the scores of all batches are added up."""
        return self.finish is not None or self.per_layer is not None

    @property
    def may_run_in_threads(self) -> bool:
        """Whether the last steps of several parameters may be taken at once, as only this package's surely may."""
        return self.per_layer in (None, lamp_scores) and isinstance(self.finish, _Damping | None)

    def complete(self, weight: Tensor, total: Tensor) -> Tensor:
        """Take the last steps, once the scores of all batches and ranks are added up.

        Args:
            weight: The alive weights of one layer, 1-D.
            total: Their added up scores, same shape.
        """
        score = total
        if self.finish is not None:  # one of the user's own may work in place, on a copy
            score = self.finish(weight.to(total.dtype, copy=not isinstance(self.finish, _Damping)), total)
        return score if self.per_layer is None else self.per_layer(score)


_CRITERIA: dict[str, Criterion] = {}
_BUILT_IN: frozenset[str] = frozenset()  # filled at the end of this file


def register(
    *names: str, summed: bool = True, elementwise: bool = False, replace: bool = False
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Make a function available as ``criterion="name"``.

    Args:
        *names: The names.
        summed: As in :class:`Criterion`.
        elementwise: As in :class:`Criterion`.
        replace: Whether it may take the place of a criterion of this package.

    Raises:
        TypeError: If a name is no str, or another argument no bool.
        ValueError: If a name is one of this package's, unless ``replace``.

    Example:
        >>> @register("cubic", elementwise=True)
        ... def cubic(weight, grad):
        ...     return (weight * grad).abs() ** 3
        >>> resolve("cubic").name
        'cubic'
    """
    check_flag("replace", replace)
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"names: must be str, found {wrong(odd[0])}")
    taken = sorted(_BUILT_IN.intersection(names))
    if taken and not replace:
        raise ValueError(f"names: must not be of this package, found {taken[0]!r}; choose another, or replace=True")

    def add(function: ScoreFunction) -> ScoreFunction:
        for name in names:
            _CRITERIA[name] = Criterion(name, function, summed, elementwise)
        return function

    return add


@register("snip", "taylor", elementwise=True)
def snip(weight: Tensor, grad: Tensor) -> Tensor:
    """Connection sensitivity ``abs(w * g)``.

    At initialisation this is SNIP (Lee et al., ICLR 2019), the saliency of DiSparse static; on trained weights it is
    the first-order Taylor criterion (Molchanov et al., ICLR 2017; 2019). The two differ in when they are used, not in
    form.

    Example:
        >>> snip(torch.tensor([2.0, -3.0]), torch.tensor([-0.5, 0.0]))
        tensor([1., 0.])
    """
    return (weight * grad).abs_()


@register("magnitude", summed=False, elementwise=True)
def magnitude(weight: Tensor, grad: Tensor) -> Tensor:
    """Magnitude ``abs(w)`` (Han et al., NeurIPS 2015), the same for every task that reaches the weight.

    Example:
        >>> magnitude(torch.tensor([-2.0]), torch.tensor([0.5]))
        tensor([2.])
    """
    return weight.abs()


@register("fisher", elementwise=True)
def fisher(weight: Tensor, grad: Tensor) -> Tensor:
    """Diagonal empirical Fisher ``w^2 * g^2`` (Theis et al., 2018), with the gradient of a batch.

    Example:
        >>> fisher(torch.tensor([-2.0]), torch.tensor([0.5]))
        tensor([1.])
    """
    return (weight * grad).square_()


@register("gradient", elementwise=True)
def gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """Gradient magnitude ``abs(g)``, the growth criterion of RigL (Evci et al., ICML 2020) and of DiSparse dynamic.

    Example:
        >>> gradient(torch.tensor([-2.0]), torch.tensor([-0.5]))
        tensor([0.5000])
    """
    return grad.abs()


@register("authors_pretrained", elementwise=True)
def authors_pretrained(weight: Tensor, grad: Tensor) -> Tensor:
    """Score ``w^2 * abs(g)``, what the DiSparse authors' code computes for pre-trained Tiny-Taskonomy models.

    Example:
        >>> authors_pretrained(torch.tensor([-2.0]), torch.tensor([-0.5]))
        tensor([2.])
    """
    return (weight.square() * grad).abs_()


def lamp_scores(scores: Tensor) -> Tensor:
    """Divide each squared score by the sum of the squared scores at least as large in the same layer.

    ``s_i^2 / sum over {j: s_j >= s_i} of s_j^2`` (LAMP; Lee et al., ICLR 2021, equation 4). The largest score of every
    layer becomes exactly 1 if it is unique, so no layer is emptied before every layer is down to one weight.

    Args:
        scores: The alive scores of one layer, 1-D, any floating point type.

    Returns:
        Values in [0, 1], same shape and type, in the order of the scores. All zeros stay zero. What is too small for
        the type becomes zero as well, and then the weights' magnitudes decide: in float32 shares below 1e-45, which are
        of scores some 1e-23 of the largest. float64 tells scores apart down to 1e-150 of it.

    Raises:
        TypeError: If ``scores`` is no tensor.
        ValueError: If it is not 1-D.

    Example:
        >>> lamp_scores(torch.tensor([1.0, 3.0, 2.0]))
        tensor([0.0714, 1.0000, 0.3077])
    """
    check_kind("scores", scores, Tensor, "a tensor")
    if scores.dim() != 1:
        raise ValueError(f"scores: must be those of one layer, 1-D, found shape {tuple(scores.shape)}; flatten them")
    return squared_shares(scores)


def damped(criterion: str | Criterion | ScoreFunction = "taylor", exponent: float = 0.5) -> Criterion:
    """Damp a criterion towards the magnitude: ``abs(w)^(1 - e) * s^e``, the weighted geometric mean of the two.

    ``s`` is the criterion's score, added up over the batches. A first-order saliency such as ``s = abs(w) * sum of
    abs(g)`` varies over many more orders of magnitude than what removing a weight really costs; squared, the damped
    score is ``w^2 * A^(2e)`` with ``A`` the sum of ``abs(g)``: for ``e = 1/2`` the second-order cost of optimal brain
    damage (LeCun et al., NeurIPS 1989) with the curvature replaced by the size of the gradients. No factor matters.

    Args:
        criterion: A name, a criterion or a function ``(weight, grad) -> score``.
        exponent: From 0 (the magnitude) to 1 (the criterion itself).

    Returns:
        A criterion.

    Raises:
        TypeError: If ``exponent`` is not a number.
        ValueError: If it is out of range, or the criterion is unknown, damped or layer-adaptive already.

    Example:
        >>> damped("taylor", 0.25).name
        'damped(taylor, 0.25)'
        >>> layer_adaptive(damped("taylor")) == resolve("layer_adaptive(damped(taylor, 0.5))")
        True
        >>> damped("taylor", 0.5).complete(torch.tensor([4.0, -1.0]), torch.tensor([1.0, 9.0]))
        tensor([2., 3.])
    """
    base = resolve(criterion)
    if isinstance(exponent, bool) or not isinstance(exponent, numbers.Real):
        raise TypeError(f"exponent: must be a number from 0 to 1, found {wrong(exponent)}")
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent: must be from 0 (magnitude) to 1 (the criterion itself), found {exponent}")
    if base.has_last_steps:
        raise ValueError(
            f"criterion: must be neither damped nor layer-adaptive yet, found {base.name!r}; write "
            "layer_adaptive(damped(...))"
        )
    step = _Damping(float(exponent))
    shown = repr(step.exponent).removesuffix(".0")  # all digits: by its name it is found again
    return dataclasses.replace(base, name=f"damped({base.name}, {shown})", finish=step)


@dataclasses.dataclass(frozen=True)
class _Damping:
    """The last step of :func:`damped`; a class, so that equal criteria compare equal."""

    exponent: float

    def __call__(self, weight: Tensor, total: Tensor) -> Tensor:
        if weight.device.type != "cpu":
            return self._of(weight, total)
        result = torch.empty_like(total)  # piece by piece: what is made on the way stays in the cache
        for part, w, s in zip(result.split(PIECE), weight.split(PIECE), total.split(PIECE), strict=True):
            part.copy_(self._of(w, s))
        return result

    def _of(self, weight: Tensor, total: Tensor) -> Tensor:
        return _power(weight.abs(), 1 - self.exponent).mul_(_power(total.abs(), self.exponent))


def _power(values: Tensor, exponent: float) -> Tensor:
    """Raise values to a power in place, quarters by square roots.

    Those are rounded correctly everywhere. The last bit of other powers depends on where in memory a value lies, so the
    pieces of a sharded weight would not be scored as the whole.
    """
    if 4 * exponent not in (1, 2, 3):
        return values.pow_(exponent)
    root = values.sqrt_()
    return root if exponent == 0.5 else root.sqrt_() if exponent < 0.5 else root.mul_(root.sqrt())


def layer_adaptive(criterion: str | Criterion | ScoreFunction) -> Criterion:
    """Make any criterion layer-adaptive by LAMP's normalisation of each task's scores.

    One-shot gradient criteria such as ``abs(w*g)`` give whole layers small scores and prune them away. With this
    wrapper, which is :func:`~disparse_plugin.criteria.lamp_scores` on them, layers compete by how much of their own
    score a weight carries.

    Args:
        criterion: A name, a criterion or a function ``(weight, grad) -> score``.

    Returns:
        A criterion; ``layer_adaptive("magnitude")`` is ``"lamp"``.

    Raises:
        ValueError: If the criterion is unknown or already works per layer.

    Example:
        >>> layer_adaptive("taylor").name
        'layer_adaptive(taylor)'
    """
    base = resolve(criterion)
    if base.per_layer is not None:
        raise ValueError(f"criterion: must be one not layer-adaptive yet, found {base.name!r}; pass it as it is")
    return dataclasses.replace(base, name=f"layer_adaptive({base.name})", per_layer=lamp_scores)


def resolve(criterion: str | Criterion | ScoreFunction) -> Criterion:
    """Turn what a user passes as ``criterion`` into a :class:`Criterion`.

    Args:
        criterion: A registered name, what reports print (``"layer_adaptive(taylor)"``), a :class:`Criterion`, or a
            function ``(weight, grad) -> score``.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is none of these.

    Example:
        >>> resolve("snip").summed, resolve(lambda weight, grad: grad.abs()).name
        (True, '<lambda>')
        >>> resolve("layer_adaptive(taylor)") == layer_adaptive("taylor")
        True
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return _by_name(criterion)
    given: object = criterion
    if given is layer_adaptive or given is damped:
        raise TypeError(
            f"criterion: {criterion.__name__} works on another criterion, found the function itself; "
            f"pass {criterion.__name__}('taylor')"
        )
    if callable(criterion) and not isinstance(criterion, type):
        return Criterion(getattr(criterion, "__name__", type(criterion).__name__), criterion)
    raise TypeError(f"criterion: must be a name or a callable(weight, grad), found {wrong(criterion)}")


def _by_name(name: str) -> Criterion:
    """Read the grammar of reports: ``NAME``, or ``WRAPPER(CRITERION)``."""
    if name in _CRITERIA:
        return _CRITERIA[name]
    if (wrapped := re.fullmatch(r"(\w+)\((.*)\)", name)) is not None and wrapped[1] in _WRAPPERS:
        return _WRAPPERS[wrapped[1]](wrapped[2].strip())
    if name in _WRAPPERS:
        raise ValueError(f"criterion: {name} works on another criterion, found none; write '{name}(taylor)'")
    known = [*_CRITERIA, *(f"{wrapper}({inner})" for wrapper in _WRAPPERS for inner in _CRITERIA)]
    raise ValueError(
        f"criterion: must be one of {', '.join(sorted(_CRITERIA))}, layer_adaptive(...) or damped(..., exponent) of "
        f"one, or a callable(weight, grad), found {name!r}{did_you_mean(name, known)}"
    )


def _damped_by_name(arguments: str) -> Criterion:
    """Read ``CRITERION`` or ``CRITERION, EXPONENT``."""
    inner, comma, last = arguments.rpartition(",")
    if not comma:
        return damped(arguments)
    try:
        return damped(inner.strip(), float(last))
    except ValueError as error:
        if "could not convert" not in str(error):
            raise
        raise ValueError(f"criterion: the exponent of damped must be a number, found {last.strip()!r}") from None


_WRAPPERS: dict[str, Callable[[str], Criterion]] = {"layer_adaptive": layer_adaptive, "damped": _damped_by_name}
_CRITERIA["lamp"] = dataclasses.replace(layer_adaptive("magnitude"), name="lamp")
_BUILT_IN = frozenset(_CRITERIA)
_OWN_SCORES = tuple(criterion.score for criterion in _CRITERIA.values())
