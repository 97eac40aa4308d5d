"""Records in, batches out: readers, the made-up world, tilings, chat templates, mixtures, the loader."""
