"""What a model is wanted for, one verb after the other, on the liver of another laboratory."""

import numpy as np

from vampsc import VAMP, organs


def test_denoise_join_label_compare_predict(shared_data, tmp_path):
    """Five uses of one file, as its user would try them. The truth of each is made of the file:
    hidden labels, two made-up batches, a made-up stimulus.
    """
    liver = organs.load(str(shared_data / "liver_he.h5ad"))
    liver = liver[np.random.default_rng(0).permutation(liver.n_obs)[:900]].copy()
    rng = np.random.default_rng(1)
    X = liver.X.toarray()
    # in the second laboratory half of the genes are caught less
    second = rng.random(900) < 0.5
    caught_less = rng.random(liver.n_vars) < 0.5
    X[np.ix_(second, caught_less)] = rng.binomial(X[np.ix_(second, caught_less)].astype(int), 0.3)
    # a stimulus lowers twenty of the frequent genes; the last cells are not stimulated
    stimulated = (rng.random(900) < 0.5) & (np.arange(900) < 700)
    lowered = np.argsort(-X.mean(0))[:40:2]
    X[np.ix_(stimulated, lowered)] = rng.binomial(X[np.ix_(stimulated, lowered)].astype(int), 0.2)
    liver.X = X.astype("float32")
    liver.obs["lab"] = np.where(second, "two", "one")
    liver.obs["condition"] = np.where(stimulated, "stim", "ctrl")
    known, new = liver[:700].copy(), liver[700:].copy()

    model = VAMP(
        known,
        n_genes=500,
        keep_genes=["CD3D", "CD79A"],
        batch_key="lab",
        encode_batch=True,
        hidden=(64,),
        n_latent=16,
        n_pseudo_inputs=50,
    )
    model.train(max_epochs=30, progress=False)

    # denoised markers, and a layer that fits
    markers = model.get_normalized_expression(known, gene_list=["CD3D", "CD79A"], use_counts=True)
    of_t = known.obs["cell_type"].astype(str).str.contains("T cell|T_cell|CD8|CD4|T-").to_numpy()
    if of_t.any():
        assert markers["CD3D"][of_t].mean() > 2 * markers["CD3D"][~of_t].mean()
    known.layers["denoised"] = model.get_normalized_expression(known, fill=np.nan).to_numpy()

    # labels of cells that the model has not seen
    labels = model.predict_labels(new, "cell_type", known)
    named = (labels["label"] != "unknown").to_numpy()
    truth = new.obs["cell_type"].astype(str).to_numpy()
    assert (labels["label"].to_numpy() == truth)[named].mean() > 0.7 and named.mean() > 0.5

    # what differs between the two largest types
    first, other = known.obs["cell_type"].value_counts().index[:2]
    found = model.differential_expression(known, "cell_type", first, other, n_samples=20)
    assert found["is_de_fdr_0.05"].sum() > 10

    # the stimulus, predicted for the cells that were spared
    predicted = model.predict_response(new, known, "condition", "ctrl", groupby="cell_type")
    genes = [gene for gene in liver.var_names[lowered] if gene in predicted.var_names]
    change = predicted.to_df()[genes].sum() / new.to_df()[genes].sum()
    assert len(genes) > 10 and change.median() < 0.7

    # and a model that comes back
    model.save(tmp_path / "model")
    embedding = model.embed(known)
    assert known.obsm[embedding].shape == (700, 16)
