"""How fast the estimators and scores are, beside the references and the floor."""
