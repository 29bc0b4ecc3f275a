"""Other people's models and trainers on this package's losses. Nothing here is imported until you ask for it.

``rlhf_kernels.integrations.transformers`` takes a model apart into what the losses need; the other modules are adapters
for one trainer each. A module checks the version of the package that it adapts and says so where it does not know it.
"""
