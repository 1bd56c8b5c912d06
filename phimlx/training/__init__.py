"""Fine-tuning: data, batches, the loss, adapters, and the run that ties them together."""
