"""MMEB's data sets by modality and meta-task, and the means that its tables show.

Names and groups as in the benchmark's own score report; `ind` are data sets that are in its
training set too (MMEB-V1 paper), a distinction that only the image tasks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

Modality = Literal["image", "video", "visdoc"]

_IMAGE = {
    ("classification", "ind"): "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    ("classification", "ood"): "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ("vqa", "ind"): "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    ("vqa", "ood"): "ScienceQA VizWiz GQA TextVQA",
    ("retrieval", "ind"): "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS "
    "WebQA",
    ("retrieval", "ood"): "OVEN FashionIQ EDIS Wiki-SS-NQ",
    ("grounding", "ind"): "MSCOCO",
    ("grounding", "ood"): "RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
IMAGE: dict[str, tuple[str, bool]] = {
    name: (meta, half == "ood") for (meta, half), names in _IMAGE.items() for name in names.split()
}
"""Data set -> its meta-task, and whether it is out of distribution."""

_VIDEO = {
    "classification": "K700 SmthSmthV2 HMDB51 UCF101 Breakfast",
    "qa": "MVBench Video-MME NExTQA EgoSchema ActivityNetQA",
    "retrieval": "DiDeMo MSR-VTT MSVD VATEX YouCook2",
    "moment": "QVHighlight Charades-STA MomentSeeker",
}
VIDEO: dict[str, str] = {name: meta for meta, names in _VIDEO.items() for name in names.split()}

_VISDOC = {
    "vidore-v1": "ViDoRe_arxivqa ViDoRe_docvqa ViDoRe_infovqa ViDoRe_tabfquad ViDoRe_tatdqa "
    "ViDoRe_shiftproject ViDoRe_syntheticDocQA_artificial_intelligence "
    "ViDoRe_syntheticDocQA_energy ViDoRe_syntheticDocQA_government_reports "
    "ViDoRe_syntheticDocQA_healthcare_industry",
    "vidore-v2": "ViDoRe_esg_reports_human_labeled_v2 ViDoRe_biomedical_lectures_v2_multilingual "
    "ViDoRe_economics_reports_v2_multilingual ViDoRe_esg_reports_v2_multilingual",
    "visrag": "VisRAG_ArxivQA VisRAG_ChartQA VisRAG_MP-DocVQA VisRAG_SlideVQA VisRAG_InfoVQA "
    "VisRAG_PlotQA",
    "ood": "ViDoSeek-page ViDoSeek-doc MMLongBench-page MMLongBench-doc",
}
VISDOC: dict[str, str] = {name: meta for meta, names in _VISDOC.items() for name in names.split()}

MEASURE: dict[Modality, Literal["hit@1", "ndcg_linear@5"]] = {
    "image": "hit@1",
    "video": "hit@1",
    "visdoc": "ndcg_linear@5",
}
FRAMES = 8
"""Number of frames of each video, evenly spaced."""
DATA_SETS: dict[Modality, tuple[str, ...]] = {
    "image": tuple(IMAGE),
    "video": tuple(VIDEO),
    "visdoc": tuple(VISDOC),
}


def half_means(groups: Mapping[str, tuple[str, bool]]) -> dict[str, tuple[str, ...]]:
    """Mean -> its data sets: per meta-task, `ind`, `ood`, and `all`.

    groups   data set -> its meta-task, and whether it is out of distribution
    """
    means = _by(groups, lambda name: groups[name][0])
    means |= _by(groups, lambda name: "ood" if groups[name][1] else "ind")
    return means | {"all": tuple(groups)}


def meta_means(groups: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The same without halves: per meta-task, and `all`."""
    return _by(groups, lambda name: groups[name]) | {"all": tuple(groups)}


def overall_means(results: Mapping[Modality, Mapping[str, float]]) -> dict[str, float]:
    """MMEB-V2's last columns: the plain mean of each modality, and `all` over its 78 data sets.

    results   modality -> data set -> its score. A mean that lacks one is omitted
    """
    groups: dict[str, list[float | None]] = {
        modality: [results.get(modality, {}).get(name) for name in names]
        for modality, names in DATA_SETS.items()
    }
    groups["all"] = [score for scores in groups.values() for score in scores]
    return {
        group: sum(known) / len(known)
        for group, scores in groups.items()
        if len(known := [score for score in scores if score is not None]) == len(scores)
    }


def _by(groups: Iterable[str], group_of: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    members: dict[str, list[str]] = {}
    for name in groups:
        members.setdefault(group_of(name), []).append(name)
    return {group: tuple(names) for group, names in members.items()}
