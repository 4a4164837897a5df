"""Sites and plates of a model and a guide, their traces, importance weights and imputation."""
