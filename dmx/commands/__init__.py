"""The commands' options and plans; light files, so that the TAB key is quick."""
