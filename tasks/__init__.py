"""The steps of the factory: pure domain logic first, beside it the Prefect task that runs it on the cluster."""
