"""Tasks and backbones as data, and how their pictures and weights come here."""
