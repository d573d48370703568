"""Each study of the registry, from a server in the layout of its publication to one AnnData in the
common form.
"""

import json
import re
import warnings
from urllib.parse import unquote

import layouts
import numpy as np
import pandas as pd
import pytest
from server import Server

from vampsc import downloads, organs
from vampsc.downloads import DownloadError
from vampsc.genes import GeneSpace
from vampsc.organs import OrganError

KNOWN = organs.registry()
SOURCES = [
    (name, source["name"])
    for name, entry in KNOWN.items()
    for source in entry["source"]
    if source.get("access") != "embedded"
]
API = "/api.cellxgene.cziscience.com/curation/v1/collections/{}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    "In the place of all servers; an empty cache, and a folder for what people put there by hand."
    monkeypatch.setattr(downloads, "RETRY_SECONDS", 0.01)
    with Server().running() as server:
        monkeypatch.setenv(
            "VAMPSC_MIRRORS", f"https://={server.address}/ http://cf.10x={server.address}/cf.10x"
        )
        monkeypatch.setenv("VAMPSC_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("VAMPSC_DATA", str(tmp_path / "hand"))
        yield server


def publish(server, study, source_name, tmp_path):
    "Put the files of a source where the registry looks for them; returns their Truth."
    source = next(s for s in KNOWN[study]["source"] if s["name"] == source_name)
    files, truth = layouts.write(study, source_name, tmp_path / "published" / study / source_name)
    if "cellxgene" in source:
        tissues = layouts.TISSUES[study]
        datasets = [
            {
                "dataset_id": role,
                "title": role,
                "tissue": [{"label": t, "ontology_term_id": "UBERON:0"} for t in tissues],
                "assets": [
                    {"filetype": "RDS", "url": "https://x/y.rds"},
                    {
                        "filetype": "H5AD",
                        "url": f"https://datasets.cellxgene.cziscience.com/{role}-v3.h5ad",
                    },
                ],
            }
            for role in files
        ]
        other = {
            "dataset_id": "other",
            "tissue": [{"label": "lung"}],
            "assets": [
                {"filetype": "H5AD", "url": "https://datasets.cellxgene.cziscience.com/no.h5ad"}
            ],
        }
        more = (
            [other]
            if source["cellxgene"].get("tissue") or source["cellxgene"].get("datasets")
            else []
        )
        server.files[API.format(source["cellxgene"]["collection"])] = json.dumps(
            {"datasets": [*more, *datasets]}
        ).encode()
        for role, path in files.items():
            server.files[f"/datasets.cellxgene.cziscience.com/{role}-v3.h5ad"] = path.read_bytes()
        return truth
    for role, file in source["files"].items():
        if file.get("urls"):
            server.files[unquote(re.sub("^https?:/", "", file["urls"][0]))] = files[
                role
            ].read_bytes()
        else:
            (tmp_path / "hand").mkdir(exist_ok=True)
            (tmp_path / "hand" / file["name"]).write_bytes(files[role].read_bytes())
    return truth


def expected(truth, source, study):
    "The truth in the common form, by loops: {cell: {gene id: count}} and {cell: (label, donor)}."
    space = GeneSpace.load("gencode-48")
    ids = truth.ensembl or [""] * truth.counts.shape[1]
    by_symbol = {s: i for s, i in zip(space.symbols, space.ids) if s not in space.ambiguous}
    known = set(space.ids)
    own = [
        i.split(".")[0] if i.split(".")[0] in known else by_symbol.get(s.strip())
        for s, i in zip(truth.counts.columns, ids)
    ]
    labels = truth.cell_type or [None] * len(truth)
    renamed = {k.strip(): v for k, v in source.get("rename", {}).items()}
    counts = {}
    told = {}
    for k, cell in enumerate(truth.counts.index):
        label = None if labels[k] is None else renamed.get(labels[k].strip(), labels[k].strip())
        if label in source.get("drop", []):
            continue
        if (tissue := source.get("cellxgene", {}).get("tissue")) and tissue not in truth.obs[
            "tissue"
        ][k].lower():
            continue
        if label is not None and re.fullmatch(r"\d+", label):
            label = f"{study} cluster {label}"
        told[cell] = (
            None if label in ("", None, *source.get("unlabelled", [])) else label,
            truth.donor and truth.donor[k],
        )
        counts[cell] = {}
        for gene, n in zip(own, truth.counts.iloc[k]):
            if gene and n:
                counts[cell][gene] = counts[cell].get(gene, 0) + int(n)
    return counts, told


def load(name, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*taken from.*")
        warnings.filterwarnings("error", ".*no counts on the genes")
        return organs.load(name, progress=False, **settings)


def test_all_21_are_there():
    assert (
        len(KNOWN) == 22
        and len({s for s, _ in SOURCES}) == 21
        and len({KNOWN[s]["organ"] for s, _ in SOURCES}) == 9
    )


@pytest.mark.parametrize("study, source", SOURCES)
def test_each_study_over_http(study, source, server, tmp_path):
    truth = publish(server, study, source, tmp_path)
    entry = next(s for s in KNOWN[study]["source"] if s["name"] == source)
    if entry["reader"] == "seurat":
        pytest.importorskip("rdata", reason="rdata is not installed: pip install 'vampsc[r]'")
    adata = load(study)
    counts, told = expected(truth, entry, study)
    assert (
        adata.X.format == "csr"
        and adata.X.dtype == np.float32
        and list(adata.var_names) == list(GeneSpace.load("gencode-48").ids)
    )
    assert 0 < len(counts) == adata.n_obs
    rows = adata.X.tocsr()
    for k, cell in enumerate(counts):
        row = rows[k]
        assert {adata.var_names[j]: int(v) for j, v in zip(row.indices, row.data)} == counts[
            cell
        ], cell
    if entry.get("cell_type"):
        assert [None if pd.isna(v) else v for v in adata.obs["cell_type"]] == [
            label for label, _ in told.values()
        ]
    else:
        assert "cell_type" not in adata.obs
    if entry.get("donor"):
        assert list(adata.obs["donor"]) == [donor for _, donor in told.values()]
    assert set(adata.obs["study"]) == {study} and set(adata.obs["organ"]) == {KNOWN[study]["organ"]}
    about = adata.uns["studies"][study]
    assert (
        about["source"] == source
        and about["counts"].startswith(truth.said)
        and about["cells"] == adata.n_obs
    )

    # the second time nothing is asked for
    asked = len(server.asked)
    again = load(study)
    assert (
        len(server.asked) == asked
        and (again.X != adata.X).nnz == 0
        and list(again.obs_names) == list(adata.obs_names)
    )
    assert again.obs.astype(str).equals(adata.obs.astype(str))


def test_an_organ_is_joined(server, tmp_path):
    truths = {
        study: publish(server, study, KNOWN[study]["source"][0]["name"], tmp_path)
        for study in ("Lake2019", "Stewart2019", "Liao2020")
    }
    assert organs.studies_of("kidney") == list(truths) == organs.studies_of("kidney:all")
    kidney = load("kidney")
    assert kidney.n_obs == sum(map(len, truths.values())) and kidney.obs_names.is_unique
    assert kidney.obs["study"].value_counts().to_dict() == {
        study: len(t) for study, t in truths.items()
    }
    assert (
        kidney.obs.loc[kidney.obs["study"] == "Liao2020", "cell_type"].isna().all()
        and kidney.obs["cell_type"].nunique() > 2
    )
    for study in truths:
        own = load(study)
        part = kidney[kidney.obs["study"] == study]
        assert (part.X != own.X).nnz == 0 and list(part.obs_names) == [
            f"{study}:{name}" for name in own.obs_names
        ]
        if "donor" in own.obs:
            assert list(part.obs["donor"]) == [f"{study}:{donor}" for donor in own.obs["donor"]]
    backed = load("kidney", backed=True)
    assert backed.isbacked and (backed.to_memory().X != kidney.X).nnz == 0
    about = organs.describe("kidney", kidney)
    assert (
        about["paper"]
        and about["n_cells"] == kidney.n_obs
        and set(about["studies"]) == set(truths)
        and json.dumps(about)
    )
    assert not organs.describe("Lake2019+Liao2020", load("Lake2019+Liao2020"))["paper"]


def test_a_model_of_a_joined_organ(server, tmp_path):
    from vampsc import VAE

    for study in ("Segerstolpe2016", "Enge2017"):
        publish(server, study, KNOWN[study]["source"][0]["name"], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = VAE(load("pancreas:paper"), batch_key="study", n_genes=20, n_latent=4, hidden=(8,))
        model.train(max_epochs=1, progress=False)
    assert (
        model.batches == ["Enge2017", "Segerstolpe2016"]
        and np.isfinite(model.get_latent_representation()).all()
    )


def test_on_the_genes_of_ensembl_97(server, tmp_path):
    truth = publish(server, "Lake2019", "geo", tmp_path)
    table = tmp_path / "panel.csv"
    pd.DataFrame(
        {"id": [f"ENSG{k:011d}" for k in range(5)], "symbol": truth.counts.columns[:5]}
    ).to_csv(table, index=False)
    few = load("Lake2019", gene_space=table)
    assert few.n_vars == 5 and few.X.sum() == truth.counts.iloc[:, :5].to_numpy().sum()
    own = load("Lake2019", gene_space=None)
    assert own.X.sum() == truth.counts.to_numpy().sum()


# ---- what goes wrong


def test_what_the_authors_give_on_request(server, tmp_path):
    with pytest.raises(DownloadError) as error:
        load("Kinchen2018")
    said = str(error.value)
    assert (
        "hc_meta_data_stromal_with_donor.txt comes from the study's authors on request" in said
        and "has no such file" in said
    )
    assert (
        str(tmp_path / "cache" / "studies" / "Kinchen2018") in said
        and "VAMPSC_DATA" in said
        and "\n" not in said
    )
    publish(server, "Kinchen2018", "geo", tmp_path)
    with pytest.warns(
        UserWarning, match="Kinchen2018: taken from geo, since hca-dcp1: .* on request"
    ):
        without = organs.load("Kinchen2018", progress=False)
    assert "cell_type" not in without.obs
    # the tables are in VAMPSC_DATA now, the loom on the server
    publish(server, "Kinchen2018", "hca-dcp1", tmp_path)
    source = KNOWN["Kinchen2018"]["source"][0]["files"]["counts"]
    (tmp_path / "hand" / source["name"]).write_bytes(
        server.files[unquote(re.sub("^https?:/", "", source["urls"][0]))]
    )
    with warnings.catch_warnings():
        # a library may have others about itself
        warnings.simplefilter("error", UserWarning)
        assert organs.load("Kinchen2018", progress=False).obs["cell_type"].notna().all()


def test_half_a_file_and_the_next_try(server, tmp_path):
    publish(server, "Lake2019", "geo", tmp_path)
    path = next(p for p in server.files if "Matrix" in p)
    server.cut[path] = [500, *[0] * 30]
    with pytest.raises(DownloadError, match="500 bytes are kept, and the next try goes on"):
        load("Lake2019")
    server.cut = {}
    server.asked = []
    load("Lake2019")
    assert (path, "bytes=500-") in server.asked


def test_no_network(server, tmp_path, monkeypatch):
    monkeypatch.setenv("VAMPSC_MIRRORS", "https://=http://127.0.0.1:9/")
    with pytest.raises(
        DownloadError,
        match=(
            "study Lake2019 cannot be had. geo: .*no connection to 127.0.0.1:9.*put it there by"
            " hand"
        ),
    ):
        load("Lake2019")
    with pytest.raises(
        DownloadError, match="Enge2017 cannot be had.*GSE81547_RAW.tar.*cellxgene: no connection"
    ):
        load("Enge2017")


def test_a_changed_file(server, tmp_path):
    publish(server, "Liao2020", "geo", tmp_path)
    load("Liao2020")
    tar = tmp_path / "cache" / "studies" / "Liao2020" / "GSE131685_RAW.tar"
    tar.write_bytes(tar.read_bytes() + b"x")
    with pytest.raises(DownloadError, match="GSE131685_RAW.tar has changed.*Delete it"):
        load("Liao2020")
    tar.unlink()
    load("Liao2020")


def test_a_file_that_is_something_else(server, tmp_path):
    publish(server, "Lake2019", "geo", tmp_path)
    for path in server.files:
        server.files[path] = b"not a table"
    with pytest.raises(OrganError, match="study Lake2019: GSE121862"):
        load("Lake2019")


def test_a_full_disk(server, tmp_path):
    publish(server, "Liao2020", "geo", tmp_path)
    for path in server.files:
        server.claim[path] = 10**16
    with pytest.raises(DownloadError, match="GSE131685_RAW.tar needs .*GB more.*make room"):
        load("Liao2020")
    server.claim = {}
    assert load("Liao2020").n_obs


# ---- a registry of one's own

MINE = """
[[study]]
name = "mine"
organ = "skin"
{study}
[[study.source]]
reader = "table"
files.counts = {{ name = "mine.tsv", urls = [] }}
{source}
"""


def own(tmp_path, monkeypatch, study="", source="", text=MINE):
    (tmp_path / "own.toml").write_text(text.format(study=study, source=source))
    symbols = layouts.symbols_and_ids()[0]
    (tmp_path / "mine.tsv").write_text(
        "gene\ta\tb\n" + "".join(f"{s}\t{k}\t1\n" for k, s in enumerate(symbols))
    )
    monkeypatch.setenv("VAMPSC_ORGANS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("VAMPSC_CACHE", str(tmp_path / "cache"))


def test_own_entry(tmp_path, monkeypatch):
    own(tmp_path, monkeypatch)
    assert organs.load("skin").X.sum() == sum(range(30)) + 30 and organs.table()["here"].iloc[-1]
    assert organs.studies_of("skin") == organs.studies_of("skin:all") == ["mine"]
    (tmp_path / "mine.tsv").write_text(
        "gene\ta\tb\nINS\t5\t6\n" + (tmp_path / "mine.tsv").read_text().split("\n", 1)[1]
    )
    # an own file may change
    assert organs.load("mine").X.sum() == sum(range(30)) + 41


@pytest.mark.parametrize(
    "study, source, words",
    [
        ("titel = 'x'", "", "own.toml, study mine: no field is called 'titel', did you mean title"),
        ("cells = 'many'", "", "cells = 'many' is of another kind: int"),
        ("", "readr = 'x'", "no field is called 'readr', did you mean reader"),
        ("", "settings.speed = 1", "reader table has no setting 'speed'; it has"),
        ("", "cellxgene = { collection = 'x' }", "it needs files, or a collection"),
        ("", "files.labels = 'x.csv'", "files.labels must be like"),
        ("x =", "", "registry own.toml cannot be read"),
    ],
)
def test_own_entry_refused(study, source, words, tmp_path, monkeypatch):
    own(tmp_path, monkeypatch, study, source)
    with pytest.raises(OrganError, match=words):
        organs.table()


def test_registry_that_is_not_there(monkeypatch):
    monkeypatch.setenv("VAMPSC_ORGANS", "nowhere.toml")
    with pytest.raises(OrganError, match="no file 'nowhere.toml', which VAMPSC_ORGANS names"):
        organs.table()


def test_columns_that_are_not_there(tmp_path, monkeypatch):
    own(tmp_path, monkeypatch, source="cell_type = 'type'")
    with pytest.raises(OrganError, match="mine: the cells have no 'type'; there are none"):
        organs.load("mine")


@pytest.mark.parametrize(
    "file, cells, types",
    [("blood-facs", 3874, 10), ("blood-kang", 12261, 8), ("kidney-young", 5685, 11)],
)
def test_local_studies(file, cells, types, shared_data, monkeypatch, tmp_path):
    monkeypatch.setenv(
        "VAMPSC_ORGANS", str(organs.resources.files("vampsc").parent / "workflow" / "local.toml")
    )
    monkeypatch.setenv("VAMPSC_DATA", str(shared_data))
    monkeypatch.setenv("VAMPSC_CACHE", str(tmp_path))
    adata = organs.load(file)
    assert adata.n_obs == cells and adata.obs["cell_type"].nunique() == types
    about = organs.describe(file, adata)
    assert about["n_labelled"] == cells and not about["paper"]
