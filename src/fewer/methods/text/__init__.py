"""Methods on texts: words leave before a model reads them."""
