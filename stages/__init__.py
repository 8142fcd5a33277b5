"""The stages compute: images, network, training, features, metrics. They know no store."""
