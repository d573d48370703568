"""Small files in the layouts of the 21 studies, with the counts, labels and donors that they hold.

`write(study, source, folder)` writes the files of one source of the registry under the names that
they have there, and returns them by role with a Truth: what their reader has to make of them.
Everything is the same at each call.
"""

import csv
import functools
import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmwrite

from vampsc.genes import GeneSpace

CELLS = 36
GENES = 30
ENSG = [f"ENSG{n:011d}" for n in range(1, 100)]


@dataclass
class Truth:
    """What is in the files: counts (DataFrame, cells x genes by symbol), and of the cells and genes
    what the files say.
    """

    counts: pd.DataFrame
    ensembl: list | None = None
    cell_type: list | None = None  # labels as in the files; None where a cell has none
    donor: list | None = None
    said: str = "as published"  # how uns["counts"] begins
    obs: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.counts)

    def cells(self, kept):
        "The truth of some of the cells."
        kept = np.flatnonzero(kept) if np.asarray(kept).dtype == bool else np.asarray(kept)
        some = {
            name: None if (v := getattr(self, name)) is None else [v[k] for k in kept]
            for name in ("cell_type", "donor")
        }
        return replace(
            self,
            counts=self.counts.iloc[kept],
            obs={k: [v[i] for i in kept] for k, v in self.obs.items()},
            **some,
        )


# ---- what is in the files


@functools.cache
def symbols_and_ids(n=GENES):
    "Genes of the package's own list, so that they are recognised."
    space = GeneSpace.load("gencode-48")
    plain = [
        k
        for k, (symbol, g) in enumerate(zip(space.symbols, space.ids))
        if symbol != g and symbol.isalnum()
    ]
    plain = plain[100 : 100 + 7 * n : 7]
    return [str(space.symbols[k]) for k in plain], [str(space.ids[k]) for k in plain]


def truth(study, labels, donors, cells=None, scale=1.0, n=CELLS):
    """Counts of n cells of a study: overdispersed, with a different mean for each gene, no cell and
    no gene without any.
    """
    rng = np.random.default_rng(zlib.crc32(study.encode()))
    symbols, ids = symbols_and_ids()
    means = scale * rng.lognormal(0.3, 1.2, GENES)
    X = rng.poisson(means * rng.gamma(2, 0.5, (n, GENES)))
    X[np.arange(n), np.arange(n) % GENES] += 1
    cells = [f"cell{k:02d}" for k in range(n)] if cells is None else [cells(k) for k in range(n)]

    def pick(values):
        return None if values is None else [values[k % len(values)] for k in range(n)]

    return Truth(pd.DataFrame(X, cells, symbols), ids, pick(labels), pick(donors))


def barcode(k):
    "Sixteen bases, different for each number."
    return "".join("ACGT"[(k * 7919 + 104729) // 4**place % 4] for place in range(16))


# ---- text and archives


def packed(path, text):
    "Write a gzip file that is the same at each call."
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def zipped(path, member, text):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(member), text, zipfile.ZIP_DEFLATED)


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def r_table(counts, sep="\t", digits=None):
    "Genes x cells as R's write.table writes it: the header is one field short."
    show = (lambda v: f"{v:.{digits}f}".rstrip("0").rstrip(".")) if digits else str
    rows = [
        sep.join([gene, *map(show, values)])
        for gene, values in zip(counts.columns, counts.to_numpy().T)
    ]
    return "\n".join([sep.join(counts.index), *rows]) + "\n"


def full_table(counts, first, sep="\t", quote="", show=str):
    "Genes x cells with a full header."
    header = sep.join([first, *(f"{quote}{cell}{quote}" for cell in counts.index)])
    rows = [
        sep.join([f"{quote}{gene}{quote}", *map(show, values)])
        for gene, values in zip(counts.columns, counts.to_numpy().T)
    ]
    return "\n".join([header, *rows]) + "\n"


# ---- F1: h5ad of AnnData 0.6 and before


def legacy_h5ad(path, X, obs, var, dense=False):
    "obs and var are compound datasets, names of categories are in uns."
    with h5py.File(path, "w") as file:
        if dense:
            file["X"] = X.toarray()
        else:
            group = file.create_group("X")
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = (
                np.bytes_("csr"),
                list(X.shape),
            )
            for name, dtype in (("data", "f4"), ("indices", "i4"), ("indptr", "i4")):
                group[name] = getattr(X, name).astype(dtype)
        for key, frame in (("obs", obs), ("var", var)):
            columns = {"index": frame.index.to_numpy().astype("S20")}
            for name, column in frame.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    columns[name] = column.cat.codes.to_numpy().astype("i1")
                    file[f"uns/{name}_categories"] = column.cat.categories.to_numpy().astype("S")
                else:
                    columns[name] = column.to_numpy().astype(
                        "f4" if column.dtype.kind == "f" else "S20"
                    )
            rows = np.empty(len(frame), [(name, values.dtype) for name, values in columns.items()])
            for name, values in columns.items():
                rows[name] = values
            file[key] = rows


def normalised(counts, totals, variant="B"):
    """A: counts of 10,000 in all; B: their logarithms (log(1 + x)); C: logarithms of the counts.

    CSR float32.
    """
    scaled = (
        counts.to_numpy("float64")
        if variant == "C"
        else counts.to_numpy("float64") / np.asarray(totals)[:, None] * 1e4
    )
    return sparse.csr_matrix((scaled if variant == "A" else np.log1p(scaled)).astype("float32"))


def madissoon(study, source, folder, variant="A", dense=False):
    oesophagus = study.endswith("oesophagus")
    labels = (
        ["Epi_basal", "Glands_mucous", "Stroma"]
        if oesophagus
        else ["B_follicular", "T_CD4_naive", "Unknown", "NK"]
    )
    t = truth(study, labels, ["356C", "362C", "367C"])
    totals = t.counts.sum(axis=1).to_numpy("float32") + np.where(np.arange(CELLS) == 4, 11, 0)
    obs = pd.DataFrame(
        {
            "Celltypes": pd.Categorical(t.cell_type),
            "n_counts": totals.astype("float32"),
            "patient": pd.Categorical(t.donor),
        },
        index=t.counts.index,
    )
    column = f"gene_ids-HCATisStab{7413619 if oesophagus else 7463846}"
    path = folder / ("oesophagus.cellxgene.h5ad" if oesophagus else "spleen.cellxgene.h5ad")
    legacy_h5ad(
        path,
        normalised(t.counts, totals, variant),
        obs,
        pd.DataFrame({column: t.ensembl}, index=t.counts.columns),
        dense,
    )
    formula = {"A": "X n / 10000", "B": "(exp(X) - 1) n / 10000", "C": "exp(X) - 1"}[variant]
    return {"counts": path}, replace(t, said=f"from {formula}")


# ---- F2: h5ad of AnnData 0.7 and later


def write_h5ad(path, X, t, obs, var=None):
    ad.AnnData(
        X,
        obs=pd.DataFrame(obs, index=t.counts.index),
        var=pd.DataFrame(var, index=t.counts.columns),
    ).write_h5ad(path)


COVID19 = {
    "Smillie2019": ("smillie19_epi", ["TA 1", "Goblet", "MT-hi"]),
    "Wang2020_colon": ("wang20_colon", ["Stem Cell", "Enteriendocrine", "TA"]),
    "James2020": ("james20", ["B cell memory", "cDC1", "Th17"]),
    "MacParland2018": ("macparland18", ["Hepatocyte_1", "NK-like_Cells"]),
    "Baron2016": ("baron16", ["alpha", "beta", "quiescent_stellate"]),
}


def covid19(study, source, folder):
    """log(1 + counts per 10,000), with totals that were taken before genes were filtered: one
    cell's is larger than its sum.
    """
    name, labels = COVID19[study]
    james = study == "James2020"
    donors = {
        "James2020": ["290b", "298c", "302c", "390c", "417c"],
        "Wang2020_colon": ["Colon-1", "Colon-2"],
    }
    t = truth(study, labels, donors.get(study))
    totals = t.counts.sum(axis=1).to_numpy() + np.where(np.arange(CELLS) == 2, 7, 0)
    obs = {
        "cell_type" if james else "CellType": pd.Categorical(t.cell_type),
        "n_counts": totals.astype("float32"),
    }
    if james:
        obs |= {
            "donor": pd.Categorical(t.donor),
            "region": pd.Categorical(["Caecum", "Sigmoid"] * (CELLS // 2)),
        }
    if study == "Wang2020_colon":
        obs["sample"] = pd.Categorical(t.donor)
    path = folder / f"{name}.processed.h5ad"
    write_h5ad(
        path, normalised(t.counts, totals), t, obs, {"gene_ids": t.ensembl} if james else None
    )
    return {"counts": path}, replace(
        t, ensembl=t.ensembl if james else None, said="from (exp(X) - 1) n / 10000"
    )


def stewart(study, source, folder):
    """Two files with other genes each, logarithms without totals: their exp(X) - 1 is what can be
    had.
    """
    t = truth(study, ["Proximal tubule", "Podocyte", "Myofibroblast"], None)
    X = normalised(t.counts, t.counts.sum(axis=1))
    files = {"mature": folder / "Mature_Full_v2.1.h5ad", "fetal": folder / "Fetal_full.h5ad"}
    rows = {"mature": slice(0, 20), "fetal": slice(20, CELLS)}
    # in other orders
    genes = {"mature": np.arange(0, 26), "fetal": np.r_[np.arange(29, 9, -1), 3, 1]}
    for role, path in files.items():
        part = Truth(t.counts.iloc[rows[role], genes[role]])
        write_h5ad(
            path,
            X[rows[role]][:, genes[role]],
            part,
            {"celltype": pd.Categorical(t.cell_type[rows[role]]), "Project": "x"},
            {"ID": [t.ensembl[g] for g in genes[role]]},
        )
    common = [g for g in genes["mature"] if g in genes["fetal"]]
    values = np.expm1(X.toarray().astype("float64"))[:, common].astype("float32")
    kept = pd.DataFrame(values, t.counts.index, t.counts.columns[common])
    return files, replace(
        t,
        counts=kept,
        ensembl=[t.ensembl[g] for g in common],
        said="normalised: exp(X) - 1",
        obs={"part": ["mature"] * 20 + ["fetal"] * (CELLS - 20)},
    )


def popescu(study, source, folder):
    t = truth(
        study, ["HSC_MPP", "Kupffer Cell", "Hepatocyte"], ["FCAImmP7198432", "FCAImmP7277553"]
    )
    path = folder / "fetal_liver_alladata_.h5ad"
    write_h5ad(
        path,
        sparse.csr_matrix(t.counts.to_numpy("float32")),
        t,
        {
            "cell.labels": pd.Categorical(t.cell_type),
            "orig.ident": pd.Categorical(t.donor),
            "sort.ids": "CD45+",
            "stages": "9 weeks",
            "batch": "F21",
        },
    )
    return {"counts": path}, replace(t, ensembl=None)


# ---- F3: h5ad of CELLxGENE

TISSUES = {
    "Smillie2019": ["colon"],
    "Wang2020_colon": ["ileum", "colon", "rectum"],
    "James2020": ["colon", "mesenteric lymph node"],
    "Madissoon2020_oesophagus": ["esophagus mucosa"],
    "Madissoon2020_spleen": ["spleen"],
    "Stewart2019": ["kidney"],
    "MacParland2018": ["liver"],
    "Enge2017": ["islet of Langerhans"],
    "VentoTormo2018_10x": ["placenta", "decidua"],
    "VentoTormo2018_ss2": ["decidua", "blood"],
}
DATASETS = {
    "Stewart2019": ["9ea768a2-87ab-46b6-a73d-c4e915f25af3", "d7dcfd8f-2ee7-4385-b9ac-e074c23ed190"],
    "Enge2017": ["66d15835-5dc8-4e96-b0eb-f48971cb65e8"],
    "Wang2020_colon": ["wang-dataset"],
    "Smillie2019": ["smillie-dataset"],
    "James2020": ["james-dataset"],
    "Madissoon2020_oesophagus": ["oesophagus-dataset"],
    "Madissoon2020_spleen": ["spleen-dataset"],
    "MacParland2018": ["macparland-dataset"],
    "VentoTormo2018_10x": ["vento-10x", "vento-ss2"],
    "VentoTormo2018_ss2": ["vento-10x", "vento-ss2"],
}


def cellxgene_h5ad(path, t, tissue, assay="10x 3' v2", variant="A"):
    """Variant A: logarithms of some of the genes in X, counts of all in raw.

    Variant B: counts in X, no raw.
    """
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(t.cell_type),
            "cell_type_ontology_term_id": "CL:0000000",
            "donor_id": pd.Categorical(t.donor),
            "tissue": pd.Categorical(tissue),
            "disease": "normal",
            "assay": assay,
            "is_primary_data": True,
            "suspension_type": "cell",
            "author_cell_type": pd.Categorical([f"{c} (author)" for c in t.cell_type]),
        },
        index=t.counts.index,
    )
    var = pd.DataFrame(
        {
            "feature_name": pd.Categorical(t.counts.columns),
            "feature_is_filtered": False,
            "feature_biotype": "gene",
        },
        index=t.ensembl,
    )
    X = sparse.csr_matrix(t.counts.to_numpy("float32"))
    adata = ad.AnnData(X, obs=obs, var=var, uns={"title": "A study"})
    if variant == "A":
        logged = ad.AnnData(
            normalised(t.counts, t.counts.sum(axis=1)), obs=obs, var=var, uns=adata.uns
        )[:, :-4].copy()
        logged.raw = adata
        adata = logged
    adata.write_h5ad(path)


def cellxgene(study, source, folder, variant="A"):
    ids = DATASETS[study]
    t = truth(
        study + " cellxgene", ["type I cell", "type II cell", "unknown"], ["D1", "D2", "D3", "D4"]
    )
    if study.startswith("VentoTormo"):
        t = truth(
            "VentoTormo2018 cellxgene",
            ["trophoblast cell", "unknown", "decidual cell"],
            ["D1", "D2", "D3", "D4"],
        )
    tissue = [TISSUES[study][k % len(TISSUES[study])] for k in range(CELLS)]
    halves = np.array_split(np.arange(CELLS), len(ids))
    for name, half in zip(ids, halves):
        assay = "Smart-seq2" if name == "vento-ss2" else "10x 3' v2"
        cellxgene_h5ad(
            folder / f"{name}.h5ad", t.cells(half), [tissue[c] for c in half], assay, variant
        )
    parts = np.repeat(ids, [len(half) for half in halves])
    mine = np.isin(
        parts,
        {"VentoTormo2018_10x": ["vento-10x"], "VentoTormo2018_ss2": ["vento-ss2"]}.get(study, ids),
    )
    t.obs["tissue"] = tissue
    if len(ids) > 1 and mine.all():
        t.obs["part"] = list(parts)
    return {name: folder / f"{name}.h5ad" for name in ids}, t.cells(mine)


# ---- F4: HDF5 of Cell Ranger 3


def tenx(study, source, folder):
    t = truth(study, None, None, cells=lambda k: f"{barcode(k)}-1")
    # one name twice
    symbols = [*t.counts.columns[:-1], t.counts.columns[0]]
    path = folder / "pbmc_10k_v3_filtered_feature_bc_matrix.h5"
    X = sparse.csr_matrix(t.counts.to_numpy("int32"))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(t.counts.index, "S")
        for name, values in {
            "data": X.data,
            "indices": X.indices.astype("i8"),
            "indptr": X.indptr.astype("i8"),
        }.items():
            group.create_dataset(name, data=values, compression="gzip")
        group["shape"] = np.array(X.shape[::-1], "i4")
        features = {
            "id": t.ensembl,
            "name": symbols,
            "feature_type": ["Gene Expression"] * GENES,
            "genome": ["GRCh38"] * GENES,
            "_all_tag_keys": ["genome"],
        }
        for name, values in features.items():
            group[f"features/{name}"] = np.array(values, "S")
    return {"counts": path}, replace(t, counts=t.counts.set_axis(symbols, axis=1))


# ---- F5, F6: loom files of the Human Cell Atlas, and Kinchen et al.


def loom(path, t, columns):
    n = len(t.counts)
    with h5py.File(path, "w") as file:
        file.attrs["LOOM_SPEC_VERSION"] = "2.0.1"
        for name in ("layers", "row_graphs", "col_graphs"):
            file.create_group(name)
        file.create_dataset(
            "matrix", data=t.counts.to_numpy("float32").T, chunks=(8, 8), compression="gzip"
        )
        rows = {
            "Gene": list(t.counts.columns),
            "Accession": [f"{g}.{k}" if k % 3 else g for k, g in enumerate(t.ensembl)],
            "featurekey": t.ensembl,
            "featuretype": ["gene"] * GENES,
            "chromosome": ["chr1"] * GENES,
            "isgene": ["1"] * GENES,
        }
        cells = {
            "CellID": list(t.counts.index),
            "file_uuid": ["0"] * n,
            "donor_organism.sex": ["female"] * n,
            "donor_organism.provenance.document_id": t.donor,
            "cell_suspension.provenance.document_id": ["s"] * n,
            "specimen_from_organism.provenance.document_id": ["p"] * n,
            "derived_organ_label": ["blood"] * n,
            **columns,
        }
        for group, attributes in (("row_attrs", rows), ("col_attrs", cells)):
            for name, values in attributes.items():
                file[f"{group}/{name}"] = np.array(values, "S")
        file["row_attrs/featurestart"], file["row_attrs/featureend"] = (
            np.arange(GENES),
            np.arange(GENES) + 9,
        )
        file["col_attrs/genes_detected"] = (t.counts > 0).sum(axis=1).to_numpy()
        file["col_attrs/total_umis"] = t.counts.sum(axis=1).to_numpy("float64")


ORGANS = {"ICA2018_cordblood": "umbilical cord blood", "ICA2018_bonemarrow": "bone marrow"}


def census(study, source, folder):
    "One file of two organs, each with empty droplets."
    t = truth("ICA2018", None, ["donor-1", "donor-2", "donor-3"], cells=lambda k: f"cell-{k}")
    # a symbol twice
    t = replace(t, counts=t.counts.set_axis([*t.counts.columns[:-1], t.counts.columns[3]], axis=1))
    parts = [list(ORGANS.values())[k // 2 % 2] for k in range(CELLS)]
    real = [("t", "f", "t", "t", "f")[k % 5] for k in range(CELLS)]
    path = folder / "cc95ff89-2e68-4a08-a234-480eca21ce79.homo_sapiens.loom"
    loom(
        path,
        t,
        {
            "barcode": [barcode(k) for k in range(CELLS)],
            "emptydrops_is_cell": real,
            "derived_organ_parts_label": parts,
            "donor_organism.diseases.ontology_label": ["normal"] * CELLS,
        },
    )
    return {"counts": path}, t.cells([p == ORGANS[study] and r == "t" for p, r in zip(parts, real)])


def kinchen_labels(path, barcodes, clusters):
    "The barcode is the fourth column."
    rows = ["\t".join(("donor", "Age", "Sex", "Barcode", "Cluster"))]
    rows += [
        "\t".join((f"D{k % 2}", str((35, 44, 55, 65)[k % 4]), "FM"[k % 2], f"{b}-{1 + k % 3}", c))
        for k, (b, c) in enumerate(zip(barcodes, clusters))
    ]
    path.write_text("\n".join(rows) + "\n")


def kinchen(study, source, folder):
    "Healthy cells and colitis, with droplets of each kind that must not come through."
    t = truth(
        study,
        ["Stromal 1", "Stromal 2a", "Glial", "Pericyte 1"],
        ["h1", "u1"],
        cells=lambda k: f"id{k}",
        scale=12,
    )
    healthy = np.arange(CELLS) % 2 == 0
    barcodes = [barcode(k) for k in range(CELLS)]
    real = ["t"] * CELLS
    # twice among the healthy: neither can be told
    barcodes[6] = barcodes[4]
    barcodes[9] = barcodes[8]  # once in each group: both stay
    # an empty droplet of the same barcode does not count
    barcodes[12], real[12] = barcodes[10], "f"
    real[1] = "f"
    t.counts.iloc[3] = 0
    t.counts.iloc[3, 5] = 249  # one short of 250
    t.counts.iloc[5] = 0
    t.counts.iloc[5, 5] = 250
    unlabelled = {14, 15}  # twice: two rows of the table, of two lanes
    twice = 16
    out = (
        {1, 3, 4, 6, 12, twice}
        | unlabelled
        | set(np.flatnonzero(t.counts.sum(axis=1).to_numpy() < 250))
    )
    for role, mine in (("healthy", healthy), ("colitis", ~healthy)):
        name = {"healthy": "hc", "colitis": "uc"}[role]
        known = [k for k in np.flatnonzero(mine) if k not in unlabelled | {6, 12}] + [twice] * (
            role == "healthy"
        )
        kinchen_labels(
            folder / f"{name}_meta_data_stromal_with_donor.txt",
            [barcodes[k] for k in known[::-1]],
            [t.cell_type[k] for k in known[::-1]],
        )
    path = folder / "f8aa201c-4ff1-45a4-890e-840d63459ca2.homo_sapiens.loom"
    loom(
        path,
        t,
        {
            "barcode": barcodes,
            "emptydrops_is_cell": real,
            "derived_organ_parts_label": ["colon"] * CELLS,
            "donor_organism.diseases.ontology_label": np.where(
                healthy, "normal", "ulcerative colitis (disease)"
            ),
        },
    )
    order = [k for group in (healthy, ~healthy) for k in np.flatnonzero(group) if k not in out]
    t.obs["part"] = ["healthy" if h else "colitis" for h in healthy]
    tables = {
        role: folder / f"{role_name}_meta_data_stromal_with_donor.txt"
        for role, role_name in (("healthy", "hc"), ("colitis", "uc"))
    }
    return {"counts": path, **tables}, t.cells(order)


def kinchen_geo(study, source, folder):
    # barcodes repeat between the groups
    t = truth(study + " geo", None, None, cells=lambda k: f"{barcode(k % 20)}-1")
    files = {}
    rows = {"healthy": ("HC", slice(0, 20)), "colitis": ("UC", slice(20, CELLS))}
    for role, (short, part) in rows.items():
        files[role] = folder / f"GSE114374_Human_{short}_expression_matrix.txt.gz"
        packed(files[role], r_table(np.log1p(t.counts.iloc[part]), digits=14))
    part = ["healthy"] * 20 + ["colitis"] * (CELLS - 20)
    named = t.counts.set_axis([f"{p}_{c}" for p, c in zip(part, t.counts.index)], axis=0)
    return files, replace(t, counts=named, ensembl=None, said="from exp(X) - 1", obs={"part": part})


# ---- F7 to F10: text


def lake(study, source, folder):
    clusters = {
        "1": "Epithelial Cells (unassigned)",
        "2": "Podocytes",
        "12": "Endothelial Cells - AEA & DVR ",
        "30": "Unknown",
    }
    numbers = list(clusters)
    t = truth(
        study,
        [clusters[n] for n in numbers],
        None,
        cells=lambda k: f"C{numbers[k % 4]}_KC{k % 3}_{barcode(k)}",
    )
    names = [
        f"GSE121862_UCSD-WU_Single_Nuclei_Cluster_{part}"
        for part in ("Annotated_Raw_UMI_Matrix.tsv.gz", "Annotations.csv.gz")
    ]
    packed(folder / names[0], r_table(t.counts))
    rows = io.StringIO()
    csv.writer(rows, quoting=csv.QUOTE_ALL).writerows(
        [["Cluster", "Annotation", "Abbreviation"], *([n, clusters[n], "x,y"] for n in numbers)]
    )
    packed(folder / names[1], rows.getvalue())
    t = replace(t, ensembl=None, obs={"library": [f"KC{k % 3}" for k in range(CELLS)]})
    return {role: folder / name for role, name in zip(("counts", "labels"), names)}, t


def aizarani(study, source, folder):
    """Counts corrected for collisions of 256 labels.

    One cell has no cluster; one gene's name says its chromosome.
    """
    t = truth(study, ["16", "11", "3", "25"], None, cells=lambda k: f"CD45pos_1_{k}", scale=0.7)
    corrected = -256 * np.log1p(-t.counts / 256)
    names = [*t.counts.columns[:-1], f"{t.counts.columns[-1]}__chr7"]
    files = {
        "counts": folder / "GSE124395_Normalhumanlivercellatlasdata.txt.gz",
        "labels": folder / "GSE124395_clusterpartition.txt.gz",
    }
    packed(files["counts"], r_table(corrected.set_axis(names, axis=1), digits=6))
    rows = [
        f'"{cell}" {kind}'
        for k, (cell, kind) in enumerate(zip(t.counts.index, t.cell_type))
        if k != 9
    ]
    packed(files["labels"], "\n".join(['"sct@cpart"', *rows[::-1]]) + "\n")
    rounded = np.rint(corrected.round(6)).astype(int)
    return files, replace(t, counts=rounded, ensembl=None, said="rounded").cells(
        [k != 9 for k in range(CELLS)]
    )


def macparland(study, source, folder, values="counts"):
    "values: counts, as the authors have them, or normalised, as in GEO."
    t = truth(
        study,
        [str(n) for n in range(1, 21)],
        ["P1TLH", "P2TLH"],
        cells=lambda k: f"P{1 + k % 2}TLH_{barcode(k)}_1",
    )
    t = replace(
        t, counts=t.counts.set_axis(["RP11-34P13.7", *t.counts.columns[1:]], axis=1), ensembl=None
    )
    factors = 3.7 / np.sqrt(1 + t.counts.sum(axis=1).to_numpy()[:, None])
    shown = t.counts if values == "counts" else np.log2(1 + t.counts * factors).round(6)
    files = {
        "counts": folder / ("GSE115469.csv.gz" if values == "counts" else "GSE115469_Data.csv.gz"),
        "labels": folder / "GSE115469_CellClusterType.txt.gz",
    }
    packed(files["counts"], full_table(shown, '""', ",", '"'))
    rows = ["CellName\tSample\tCellBarcode\tCluster#\tCellType"]
    rows += [
        f"{cell}\t{d}\t{cell.split('_')[1]}\t{label}\tHepatocyte_{label}"
        for cell, d, label in zip(t.counts.index, t.donor, t.cell_type)
    ]
    packed(files["labels"], "\n".join(rows) + "\n")
    return files, t


def vento(study, source, folder):
    "Tables of text, in zips or as they are; symbols with an underscore and with a dot."
    kind, number = ("10x", 6701) if study.endswith("10x") else ("ss2", 6678)
    t = truth(
        study,
        ["dS2", "EVT", "dNK1"],
        ["D8", "D9", "D10"],
        cells=lambda k: f"FCA{7167219 + k % 4}_{barcode(k)}",
        scale=300 if kind == "ss2" else 1,
    )
    t = replace(
        t,
        counts=t.counts.set_axis([*t.counts.columns[:-2], "FOO_1", "AC004556.1"], axis=1),
        ensembl=[*t.ensembl[:-2], "ENSG00000000009", ENSG[70]],
    )
    rows = full_table(
        t.counts.set_axis([f"{s}_{g}" for s, g in zip(t.counts.columns, t.ensembl)], axis=1), "Gene"
    )
    places = ["Decidua", "Placenta", "Blood"]
    meta = ["Fetus\tlocation\tfinal_cluster\tannotation"]
    meta += [
        f"{cell}\t{d}\t{places[k % 3]}\t{k % 5}\t{label}"
        for k, (cell, d, label) in enumerate(zip(t.counts.index, t.donor, t.cell_type))
    ]
    members = {
        "counts": (f"raw_data_{kind}.txt", rows),
        "labels": (f"meta_{kind}.txt", "\n".join(meta) + "\n"),
    }
    files = {}
    for part, (role, (member, text)) in enumerate(members.items(), 1):
        files[role] = folder / (
            member if source == "biostudies" else f"E-MTAB-{number}.processed.{part}.zip"
        )
        if source == "biostudies":
            files[role].write_text(text)
        else:
            zipped(files[role], member, text)
    return files, t


# ---- F11: RPKM and counts


def segerstolpe(study, source, folder):
    labels = ["alpha cell", "not applicable", "beta cell", "unclassified cell"]
    t = truth(study, labels, ["HP1502401", "HP1507101T2D"], cells=lambda k: f"AZ_A{k}", scale=400)
    # a symbol twice
    t = replace(
        t,
        counts=t.counts.set_axis([*t.counts.columns[:-1], t.counts.columns[0]], axis=1),
        ensembl=None,
    )
    rng = np.random.default_rng(5)
    rows = ["\t".join(["#samples", *t.counts.index])]
    extra = {"ERCC-00002": 3, "ERCC-00003": 4, "eGFP": 5}
    for gene, values in [
        *zip(t.counts.columns, t.counts.to_numpy().T),
        *((name, np.full(CELLS, v)) for name, v in extra.items()),
    ]:
        rows.append(
            "\t".join(
                [
                    gene,
                    "NM_000207+NM_001185097",
                    *(f"{v:.4f}" for v in rng.gamma(1, 9, CELLS)),
                    *map(str, values),
                ]
            )
        )
    name = "pancreas_refseq_rpkms_counts_3514sc.txt"
    files = {
        "counts": folder / (name if source == "biostudies" else "E-MTAB-5061.processed.1.zip"),
        "labels": folder / "E-MTAB-5061.sdrf.txt",
    }
    if source == "biostudies":
        files["counts"].write_text("\n".join(rows) + "\n")
    else:
        zipped(files["counts"], name, "\n".join(rows) + "\n")
    told = [
        f"Characteristics[{c}]"
        for c in ("organism", "individual", "sex", "age", "disease", "cell type")
    ]
    header = [
        "Source Name",
        "Comment[ENA_SAMPLE]",
        *told,
        "Protocol REF",
        "Protocol REF",
        "Comment[ENA_SAMPLE]",
    ]
    body = [
        [
            cell,
            "ERS1",
            "Homo sapiens",
            d,
            "male",
            "23",
            "normal" if "T2D" not in d else "type II diabetes mellitus",
            label,
            "P1",
            "P2",
            "again",
        ]
        for cell, d, label in zip(t.counts.index, t.donor, t.cell_type)
    ]
    files["labels"].write_text("\n".join("\t".join(row) for row in [header, *body[::-1]]) + "\n")
    return files, t


# ---- F12, F13: archives

SUMS = ["no_feature", "ambiguous", "too_low_aQual", "not_aligned", "alignment_not_unique", "total"]


def enge(study, source, folder):
    t = truth(
        study,
        ["alpha", "beta", "unsure", "ductal"],
        ["21_plateA", "54_plateB"],
        cells=lambda k: f"GSM{2171880 + k}",
        scale=300,
    )
    files = {
        "counts": folder / "GSE81547_RAW.tar",
        "labels": folder / "GSE81547_series_matrix.txt.gz",
    }
    with tarfile.open(files["counts"], "w") as archive:
        for k, (cell, values) in enumerate(zip(t.counts.index, t.counts.to_numpy())):
            names = [f"{gene} " if k == 2 else gene for k, gene in enumerate(t.counts.columns)]
            rows = [
                "gene\tcount",
                *(f"{g}\t{v}" for g, v in zip(names, values)),
                *(f"{s}\t12345" for s in SUMS),
            ]
            add(
                archive,
                f"{cell}_10000{k:05d}.A01.csv.gz",
                gzip.compress(("\n".join(rows) + "\n").encode(), mtime=0),
            )

    def quoted(name, values):
        return "\t".join([name, *(f'"{v}"' for v in values)])

    ages = [d.split("_")[0] for d in t.donor]
    rows = [
        '!Series_title\t"Single-cell analysis"',
        quoted("!Sample_title", [f"{d}_{k}_A01" for k, d in enumerate(t.donor)]),
        quoted("!Sample_geo_accession", t.counts.index),
        quoted("!Sample_characteristics_ch1", [f"donor_age: {a}" for a in ages]),
        quoted("!Sample_characteristics_ch1", ["gender: male"] * CELLS),
        quoted("!Sample_characteristics_ch1", [f"inferred_cell_type: {c}" for c in t.cell_type]),
        "!series_matrix_table_begin",
        quoted('"ID_REF"', t.counts.index),
        "!series_matrix_table_end",
    ]
    packed(files["labels"], "\n".join(rows) + "\n")
    return files, replace(t, ensembl=None, obs={"donor_age": ages, "gender": ["male"] * CELLS})


def liao(study, source, folder):
    """Three samples; a barcode occurs in two of them, and the third lists its genes in another
    order.
    """
    samples = ["GSM4145204_kidney1", "GSM4145205_kidney2", "GSM4145206_kidney3"]
    t = truth(study, None, samples, cells=lambda k: f"{samples[k % 3]}_{barcode(k // 3)}-1")
    path = folder / "GSE131685_RAW.tar"
    with tarfile.open(path, "w") as archive:
        for s, sample in enumerate(samples):
            rows = range(s, CELLS, 3)
            order = np.arange(GENES)[:: -1 if s == 2 else 1]
            stream = io.BytesIO()
            mmwrite(
                stream,
                sparse.coo_matrix(t.counts.iloc[rows, order].to_numpy().T),
                field="integer",
                symmetry="general",
            )
            features = "".join(
                f"{t.ensembl[g]}\t{t.counts.columns[g]}\tGene Expression\n" for g in order
            )
            barcodes = "".join(f"{cell.rsplit('_', 1)[1]}\n" for cell in t.counts.index[rows])
            for name, data in (
                ("barcodes.tsv", barcodes.encode()),
                ("features.tsv", features.encode()),
                ("matrix.mtx", stream.getvalue()),
            ):
                add(archive, f"{sample}_{name}.gz", gzip.compress(data, mtime=0))
    order = [k for s in range(3) for k in range(s, CELLS, 3)]
    return {"counts": path}, replace(t, obs={"part": list(t.donor)}).cells(order)


# ---- F14: R's serialisation (XDR, version 2) of a Seurat object, written by hand


class R:
    "Values as bytes of R's serialisation; symbols are written once and then referred to."

    def __init__(self):
        self.symbols = []

    def flags(self, kind, attributes=False, is_object=False, tag=False, levels=0):
        return struct.pack(">i", kind | levels << 12 | is_object << 8 | attributes << 9 | tag << 10)

    def char(self, text):
        if text is None:
            return self.flags(9) + struct.pack(">i", -1)
        return self.flags(9, levels=64) + struct.pack(">i", len(text.encode())) + text.encode()

    def symbol(self, name):
        if name in self.symbols:
            return struct.pack(">i", 255 | (self.symbols.index(name) + 1) << 8)
        self.symbols.append(name)
        return self.flags(1) + self.char(name)

    def pairs(self, items):
        return b"".join(
            self.flags(2, tag=True) + self.symbol(k) + self.value(v) for k, v in items.items()
        ) + self.flags(254)

    def vector(self, kind, body, n, attributes):
        """body may be a function, because symbols are numbered in the order in which they are
        written.
        """
        head = self.flags(kind, bool(attributes), "class" in (attributes or {})) + struct.pack(
            ">i", n
        )
        return (
            head
            + (body() if callable(body) else body)
            + (self.pairs(attributes) if attributes else b"")
        )

    def value(self, value, attributes=None):
        if isinstance(value, S4):
            name = Attributed([value.name], {"package": [value.package]})
            return self.flags(25, True, True, levels=16) + self.pairs(value.slots | {"class": name})
        if isinstance(value, Attributed):
            return self.value(value.value, value.attributes)
        if value is None:
            return self.flags(254)
        if value is NULL:
            return self.symbol("\1NULL\1")
        if isinstance(value, dict):
            return self.vector(
                19,
                lambda: b"".join(map(self.value, value.values())),
                len(value),
                {"names": list(value), **(attributes or {})},
            )
        if isinstance(value, np.ndarray) and value.dtype.kind == "i":
            return self.vector(13, value.astype(">i4").tobytes(), value.size, attributes)
        if isinstance(value, np.ndarray):
            return self.vector(14, value.astype(">f8").tobytes(), value.size, attributes)
        if all(isinstance(v, str) for v in value):
            return self.vector(16, b"".join(map(self.char, value)), len(value), attributes)
        return self.vector(19, lambda: b"".join(map(self.value, value)), len(value), attributes)


NULL = object()


@dataclass
class S4:
    name: str
    package: str
    slots: dict


@dataclass
class Attributed:
    value: object
    attributes: dict


def factor(values):
    levels = sorted(set(values))
    return Attributed(
        np.array([levels.index(v) + 1 for v in values], "i4"),
        {"levels": levels, "class": ["factor"]},
    )


def dgc(X, rows, columns):
    "A sparse matrix of R's package Matrix, compressed by column."
    X = sparse.csc_matrix(X)
    return S4(
        "dgCMatrix",
        "Matrix",
        {
            "i": X.indices.astype("i4"),
            "p": X.indptr.astype("i4"),
            "Dim": np.array(X.shape, "i4"),
            "Dimnames": [list(rows), list(columns)],
            "x": X.data.astype("f8"),
            "factors": [],
        },
    )


def seurat_slots(t):
    X = t.counts.to_numpy().T
    cells = list(t.counts.index)
    frame = {
        "nGene": (t.counts > 0).sum(axis=1).to_numpy("i4"),
        "nUMI": t.counts.sum(axis=1).to_numpy("f8"),
        "condition": factor(t.obs["condition"]),
        "dataset": factor(t.donor),
        "liver": list(t.donor),
        "annotation_lineage": factor(t.cell_type),
        "annotation_indepth": [f"{c} (1)" for c in t.cell_type],
    }
    return {
        "raw.data": dgc(X, t.counts.columns, cells),
        "data": dgc(np.log1p(X), t.counts.columns, cells),
        "scale.data": Attributed(np.arange(6.0), {"dim": np.array([2, 3], "i4")}),
        "var.genes": list(t.counts.columns[:3]),
        "is.expr": np.array([0.0]),
        "ident": Attributed(
            factor(t.cell_type).value, factor(t.cell_type).attributes | {"names": cells}
        ),
        "meta.data": Attributed(frame, {"row.names": cells, "class": ["data.frame"]}),
        "project.name": ["tissue"],
        "dr": [],
        "assay": [],
        "hvg.info": Attributed({}, {"row.names": np.array([], "i4"), "class": ["data.frame"]}),
        "imputed": NULL,
        "cell.names": cells,
        "calc.params": {"seed": np.array([1.0])},
        "kmeans": NULL,
        "version": Attributed(
            [np.array([2, 3, 4], "i4")], {"class": ["package_version", "numeric_version"]}
        ),
    }


def rdata(path, **objects):
    "What save() in R writes."
    writer = R()
    path.write_bytes(
        gzip.compress(
            b"RDX2\nX\n" + struct.pack(">iii", 2, 0x00030501, 0x00020300) + writer.pairs(objects),
            mtime=0,
        )
    )


def ramachandran(study, source, folder):
    t = truth(
        study,
        ["MPs", "Tcells", "Endothelia"],
        ["Healthy 1", "Cirrhotic 2"],
        cells=lambda k: f"Healthy1_{barcode(k)}-1",
    )
    t = replace(
        t,
        ensembl=None,
        obs={"condition": [["Uninjured", "Cirrhotic"][k % 2] for k in range(CELLS)]},
    )
    if source == "converted":
        path = folder / "ramachandran.h5ad"
        write_h5ad(
            path,
            sparse.csr_matrix(t.counts.to_numpy("float32")),
            t,
            {
                "annotation_lineage": pd.Categorical(t.cell_type),
                "liver": pd.Categorical(t.donor),
                **t.obs,
            },
        )
    else:
        path = folder / "tissue.rdata"
        rdata(path, tissue=S4("seurat", "Seurat", seurat_slots(t)))
    return {"counts": path}, t


# ---- all of them

WRITERS = {
    ("ICA2018_cordblood", "hca-dcp1"): census,
    ("ICA2018_bonemarrow", "hca-dcp1"): census,
    ("10x2019_pbmc10k", "10x"): tenx,
    ("Kinchen2018", "hca-dcp1"): kinchen,
    ("Kinchen2018", "geo"): kinchen_geo,
    **{(study, "covid19-atlas"): covid19 for study in COVID19},
    **{(study, "cellxgene"): cellxgene for study in TISSUES},
    ("Madissoon2020_oesophagus", "tissue-stability"): madissoon,
    ("Madissoon2020_spleen", "tissue-stability"): madissoon,
    ("Lake2019", "geo"): lake,
    ("Stewart2019", "cellgeni"): stewart,
    ("Liao2020", "geo"): liao,
    ("MacParland2018", "authors"): macparland,
    ("Popescu2019", "authors"): popescu,
    ("Ramachandran2019", "edinburgh"): ramachandran,
    ("Ramachandran2019", "converted"): ramachandran,
    ("Aizarani2019", "geo"): aizarani,
    ("Segerstolpe2016", "biostudies"): segerstolpe,
    ("Segerstolpe2016", "arrayexpress"): segerstolpe,
    ("Enge2017", "geo"): enge,
    **{
        (f"VentoTormo2018_{kind}", source): vento
        for kind in ("10x", "ss2")
        for source in ("biostudies", "arrayexpress")
    },
}


def write(study, source, folder, **variant):
    """Write the files of a source of a study into a folder.

    Returns
    -------
    files : {role: path}; of CELLxGENE the roles are its datasets. truth : Truth.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[study, source](study, source, folder, **variant)
