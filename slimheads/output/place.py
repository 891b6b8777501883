"""Which folders a run may write in: new ones, empty ones and its own, if they hold nothing that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slimheads.errors import UsageError
from slimheads.output.folder import BROWSER_FILES, PUBLISHED, refuse_foreign, refuse_links
from slimheads.recipe.recipe import Recipe

_ELSEWHERE = "choose another folder with --out"
# Files that do not make a folder count as used: placeholders for git, and those of a new file system.
_IGNORED = BROWSER_FILES | {".gitkeep", ".gitignore", "lost+found"}


def require_place(out: Path, model: Path, recipe: Recipe) -> None:
    """Refuses an output folder that a run must not write in. Writes nothing.

    Args:
        out: the output folder; it need not be there.
        model: the folder of the model's files.
        recipe: names the samples that the run reads.

    Raises:
        UsageError: naming the folder, the recipe's line or the file in the way.
    """
    if out.is_symlink():
        raise UsageError("the output folder is a link", where=str(out), hint="name the folder that it leads to")
    refuse_links(out / ".slimheads")
    _require_apart(out, model, recipe)
    if not out.is_dir() or (out / ".slimheads").is_dir():
        return
    whole = out.resolve()
    if whole in (Path.home().resolve(), Path(whole.anchor)):
        raise UsageError("a run does not write straight into this folder", where=str(out), hint=_ELSEWHERE)
    if (out / ".git").exists():
        raise UsageError("is the root of a git work tree", where=str(out), hint=f"{_ELSEWHERE}, {out / 'runs'} say")
    refuse_foreign(out, PUBLISHED)
    other = next((path.name for path in sorted(out.iterdir()) if path.name not in _IGNORED), None)
    if other:
        raise UsageError(f"holds files that are not slimheads', {other} say", where=str(out), hint=_ELSEWHERE)


def _require_apart(out: Path, model: Path, recipe: Recipe) -> None:
    """Refuses to replace anything that the run reads, whichever way the paths are written."""
    if _is_within(out, model):
        raise UsageError("the output folder lies in the model's folder", where=str(out), hint=_ELSEWHERE)
    if any(_is_within(path, out) for path in (model, *_linked_files(model))):
        raise UsageError(
            "the model lies in the output folder, and a run would replace it",
            keys=("model",),
            hint=f"copy the model elsewhere, or {_ELSEWHERE}",
        )
    for key, sample in (("verify.text", recipe.verify.text), ("verify.inputs", recipe.verify.inputs)):
        if sample and any(_is_within(Path(sample), out / name) for name in (*PUBLISHED, ".slimheads")):
            raise UsageError(
                "the sample lies where a run replaces files",
                keys=(key,),
                hint=f"move {sample} elsewhere, or {_ELSEWHERE}",
            )


def _linked_files(model: Path) -> Iterator[Path]:
    return (path for path in model.rglob("*") if path.is_symlink())


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, as the file system sees it: it may not tell capital letters apart."""
    if not folder.exists():
        return folder.resolve() in (path.resolve(), *path.resolve().parents)
    real = path.resolve()
    return any(part.exists() and part.samefile(folder) for part in (real, *real.parents))
