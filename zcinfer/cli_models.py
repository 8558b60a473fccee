"""Commands on the published models: put, ls, info, rm."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import click

from .cli_shared import JSON, printable, see_here
from .errors import ArchiveError, SettingsError, ZcinferError
from .sizes import format_size


@click.command()
@click.argument("model")
@click.option("--name", help="Name to publish under. Default: that of OBJECT, or of the directory.")
@click.option("--base", help="A published model that this is a variant of: equal tensors are one memory.")
@click.option("--trust", is_flag=True, help="Open an archive that you have not written: this runs code from it.")
@JSON
def put(model: str, name: str | None, base: str | None, trust: bool, as_json: bool) -> None:
    """Publish MODEL: an archive's directory, MODULE:OBJECT, or URL/DIGEST of a copy (setting zcinfer.remote).

    OBJECT is an nn.Module, or a function that returns one; MODULE is importable from here or from the installed
    packages ("mymodels:build" for build() in ./mymodels.py). Publishing the same content again changes nothing.
    """
    from . import catalog, publishing

    see_here()
    published: Any = model
    if not os.path.isdir(model) and "://" not in model:
        published = _import_object(model)
        name = name or model.partition(":")[2].lower()
    ref = publishing.put(published, name, base=base, trust=trust)
    if as_json:
        click.echo(json.dumps(asdict(ref)))
    else:
        private = catalog.archive(ref).description.private_nbytes
        click.echo(f"{ref}  {format_size(ref.nbytes)} shared, {format_size(private)} private  {ref.digest[:12]}")


@click.command()
@click.option("--store", help="A running Ray, 'ray:HOST:PORT', to tell what it holds. Default: the registry alone.")
@JSON
def ls(store: str | None, as_json: bool) -> None:
    """List the published models, and how full the registry's disk and a store are.

    With --store a model is "in use" where a process of this machine has it mapped, or another machine has a copy, and
    else "held".
    """
    from . import catalog
    from .model_table import in_words

    if store is not None:
        catalog.connect(store)
    table = catalog.models()
    budgets = catalog.budgets()
    for budget in budgets[1:]:
        held = {digest: "in use" if digest in budget.in_use else "held" for digest in budget.models}
        table["memory"] = table["digest"].map(held).fillna("")
    if as_json:
        click.echo(table.to_json(orient="records"))
        return
    if table.empty:
        click.echo("No models yet. Publish one: zcinfer put MODULE:OBJECT --name NAME")
    else:
        click.echo(in_words(table).to_string(index=False))
    for budget in budgets:
        click.echo(printable(budget))


@click.command()
@click.argument("model")
@click.option(
    "--verify",
    is_flag=True,
    help="Compare all contents with their digests; what was altered is replaced by its copy (zcinfer.remote).",
)
@JSON
def info(model: str, verify: bool, as_json: bool) -> None:
    """Show what is known of MODEL: NAME, NAME@VERSION, or an archive's directory, also one that is not trusted.

    No code of an archive is run.
    """
    from pathlib import Path

    from . import catalog, config
    from .archive import Archive

    try:
        ref = catalog.resolve(model)
    except ZcinferError:
        if not os.path.isdir(model):
            raise
        name, archive = model, Archive(Path(model), ours=False)
    else:
        name, archive = str(ref), catalog.archive(ref)
    if verify:
        try:
            archive.verify()
        except ArchiveError:
            if archive.directory.parent.parent != catalog.registry().directory:
                raise
            archive, _ = catalog.registry().whole(archive.directory.name)
    description, known = archive.description, archive in catalog.registry().seals
    facts = {
        "model": name,
        "class": description.class_name,
        "digest": description.digest,
        "shared bytes": description.nbytes,
        "private bytes": description.private_nbytes,
        "private": [f"{what}, {nbytes:,} bytes" for what, nbytes in description.private],
        "tensors": len(description.tensors),
        "storages": len(description.storages),
        "dtype": description.dtype,
        "submodules in train mode": len(description.training),
        "needs": description.requires,
        "directory": str(archive.directory),
        "trusted": known,
        "verified": verify,
    }
    if url := config.get("remote"):
        facts["copy"] = _copy(str(url), description.digest)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        facts["trusted"] = "yes, this user wrote it" if known else "no: zcinfer put opens it with --trust alone"
        facts["verified"] = "contents agree with their digests" if verify else "not compared (--verify)"
        held = (f"{what}, {nbytes:,} bytes" for what, nbytes in description.private)
        facts["private"] = "; ".join(held) or "the skeleton alone"
        facts["needs"] = ", ".join(f"{name} {version}".strip() for name, version in description.requires.items())
        for name, value in facts.items():
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            click.echo(f"{name:>25}  {printable(text)}")


def _copy(url: str, digest: str) -> str:
    """Where a copy is; or why there is none, or that it cannot be told."""
    from .remote import Remote

    try:
        copies = Remote(url)
        whole = any(copies.is_whole(digest, upload) for upload in copies.uploads(digest))
    except ZcinferError as error:
        return f"not known: {error}"
    return f"{copies.url}/{digest}" if whole else f"none at {copies.url}: put it again"


@click.command()
@click.argument("models", nargs=-1, required=True)
def rm(models: tuple[str, ...]) -> None:
    """Forget MODELS (NAME: all its versions; NAME@VERSION: that one)."""
    from . import catalog

    for model in models:
        catalog.delete(model)
        click.echo(f"{model} is forgotten")


def _import_object(text: str) -> Any:
    import importlib

    import torch

    module_name, _, path = text.partition(":")
    if not path or not module_name or module_name.startswith("."):
        raise SettingsError(f"{text!r} is neither an archive's directory nor MODULE:OBJECT, as in mymodels:build")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"no module {error.name!r}, looked for here ({os.getcwd()}) and among the packages"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise SettingsError(f"the module {module_name!r} has no {path!r}")
        found = getattr(found, name)
    if not isinstance(found, torch.nn.Module) and callable(found):
        found = found()
    return found
