"""What is measured on weights: spectra, null models, subspaces and activation covariances.

Nothing is imported here, so that ``import mla_study.probes`` stays cheap: import modules by name.
"""
