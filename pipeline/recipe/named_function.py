"""Functions of the user's that a recipe names: ``[loss] name`` and ``augment.transform``.

The file lies beside the recipe, or below; a run keeps a copy of it, and its text is part of what
the run is. Looking at a recipe runs none of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strata.pipeline.recipe.named_network import is_name, text_of
from strata.pipeline.recipe.strict import brief, did_you_mean, require
from strata.stages.network.blocks import PACKAGES, Origin

LOSSES = ("cross-entropy", "bce", "mse")
"""Losses by name."""


@dataclass(frozen=True)
class Loss:
    """A recipe's [loss]: what is minimised, and so which metrics say how good a layer is."""

    name: str | Origin = "cross-entropy"
    """``cross-entropy``, of class labels: top-1 and top-5. ``bce``, of vectors with a 0 … 1 for
    each class (multi-label): mean average precision. ``mse``, of one or several numbers
    (regression, ``data.classes`` of them): R² and RMSE. ``FILE.py:FUNCTION``:
    ``function(logits, labels)`` gives the loss of every sample."""

    @property
    def called(self) -> str:
        """The name as the recipe has it."""
        return self.name if isinstance(self.name, str) else self.name.name

    @property
    def kind(self) -> str:
        """The name, or ``own``."""
        return self.name if isinstance(self.name, str) else "own"


def named_function(asked: Any, folder: Path, key: str, known: tuple[str, ...]) -> str | Origin:
    """What a recipe names under a key: a word that is known, or a function.

    Raises:
        RecipeError: it is neither, or the file cannot be read.
    """
    if asked in known:
        return asked
    words = *filter(None, known), "FILE.py:FUNCTION"
    is_one = isinstance(asked, str) and is_name(asked) and not asked.startswith(PACKAGES)
    require(is_one, f"'{key}' is {brief(asked)}{did_you_mean(str(asked), words)}")
    found = Origin(asked, folder=str(folder.absolute()))
    return replace(found, code=text_of(folder, found.file or "", key))


def said(value: Any) -> Any:
    """A value of a table, as fingerprints have it: a function by its name and its text."""
    return {"name": value.name, "code": value.digest} if isinstance(value, Origin) else value
