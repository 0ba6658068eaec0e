"""Counterfactual answers: the risks they name against the true ones."""
