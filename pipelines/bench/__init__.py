"""`diffem bench`: what the machine, the store and the pipeline cost, measured here and now."""
