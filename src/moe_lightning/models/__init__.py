"""What is known of each model family: shapes, vocabularies and weight names, as data."""
