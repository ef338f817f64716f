"""`fastdeberta study`: the papers' ablation studies in miniature."""
