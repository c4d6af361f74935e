"""`finescope export`: a run's student or dictionary in the layout of another tool."""

import shutil
from collections.abc import Mapping

from finescope import directories, storage
from finescope.analysis.frames import manifests_of
from finescope.errors import UserError
from finescope.manifest import Manifest, domains_of, of_domain
from finescope.rounds import in_order, kind_of

FORMATS = ("hf", "sae-lens", "sparsify", "gguf")


def export_run(run: str, format: str, to: str, domain: str | None = None) -> str:
    """Write the student (hf) or the dictionary (sae-lens, sparsify) of a run to directory `to`, whole or not at all.

    Returns:
        Where it is: `to`, and for sparsify the folder in it that is named by the hook point.

    Raises:
        UserError: the format is not known or holds nothing of the kind, the run has no such thing yet, or `to` is not empty.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: no such format; formats: {', '.join(FORMATS)}")
    manifests = manifests_of(run)
    if format == "gguf":
        raise UserError(
            "--format gguf: not in this version; export with --format hf, a stock directory that llama.cpp's "
            "`python convert_hf_to_gguf.py DIR --outfile MODEL.gguf` converts"
        )
    target = storage.absolute(to)
    if format == "hf":
        return _export_student(run, of_domain(manifests, _domain(run, manifests, domain)), _empty(to, target))
    if "sae" not in manifests:
        raise UserError(f"the run at '{run}' has no dictionary yet: 'sae' is not done")
    return _export_dictionary(manifests, format, _empty(to, target))


def _domain(run: str, manifests: Mapping[str, Manifest], asked: str | None) -> str:
    domains = domains_of(manifests)
    if asked is None and len(domains) <= 1:
        return "".join(domains)
    if asked not in domains:
        known = ", ".join(domains) or "none"
        raise UserError(f"--domain {asked or ''}: expected one of the domains of the run at '{run}': {known}")
    return asked


def _export_student(run: str, manifests: Mapping[str, Manifest], target: str) -> str:
    students = in_order(name for name in manifests if kind_of(name) in ("prune", "distill"))
    if not students:
        raise UserError(f"the run at '{run}' has no student yet: neither 'distill' nor 'prune' is done")
    with (
        directories.local_directory(storage.join(manifests[students[-1]].uri, "model")) as model,
        directories.scratch_directory(target) as copy,
    ):
        shutil.copytree(model, copy)
        directories.put_tree(copy, target)
    return target


def _export_dictionary(manifests: Mapping[str, Manifest], format: str, target: str) -> str:
    # They import torch: a mistake that is told of above is told of without that wait.
    from finescope.sae.dictionary import load_dictionary
    from finescope.sae.hook_names import normed_outputs
    from finescope.sae.saelens import save_saelens
    from finescope.sae.sparsify import save_sparsify

    dictionary = load_dictionary(storage.join(manifests["sae"].uri, "dictionary"))
    if format == "sparsify":
        return save_sparsify(target, dictionary)
    family, site = manifests["model"].facts["reference"]["model_type"], dictionary.hook.site
    if site in ("attention", "mlp") and normed_outputs(family):
        raise UserError(
            f"--format sae-lens: SAELens reads site {site} of family '{family}' after the norm that follows it, this dictionary "
            "before; of this family it knows the sites residual and mlp_hidden alike"
        )
    return save_saelens(target, dictionary)


def _empty(to: str, target: str) -> str:
    fs, path = storage.filesystem(target)
    if fs.exists(path) and (not fs.isdir(path) or fs.ls(path, detail=False)):
        raise UserError(f"--to {to}: expected a directory that is empty or not there yet")
    return target
