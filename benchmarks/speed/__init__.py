"""How fast estimators, scores and the remover are, beside the references and the floor."""
