# Who may do what. dispatcher/permissions.py says who needs which permission and why; a test compares the two.

locals {
  # What our code runs as.
  runtime_accounts = {
    dispatcher = "gemma-export: export_api, which answers callers"
    trigger    = "gemma-export: start_export and fail_export, which start executions"
    sweeper    = "gemma-export: sweep, which puts right what died and collects"
    exporter   = "gemma-export: the job"
  }

  # What others of Google's call our functions as; they may do nothing else.
  invoker_accounts = {
    gateway   = "gemma-export: API Gateway, which calls export_api"
    push      = "gemma-export: Pub/Sub, which calls start_export and fail_export"
    scheduler = "gemma-export: Cloud Scheduler, which calls sweep"
  }

  # Predefined roles bring more than any of these needs.
  roles = {
    RecordsWriter     = ["datastore.entities.create", "datastore.entities.get", "datastore.entities.list", "datastore.entities.update"]
    RecordsLauncher   = ["datastore.entities.get", "datastore.entities.update"]
    RecordsSweeper    = ["datastore.entities.get", "datastore.entities.list", "datastore.entities.update"]
    ObjectLister      = ["storage.objects.list"]
    ObjectReader      = ["storage.objects.get"]
    ObjectWriter      = ["storage.objects.create", "storage.objects.delete", "storage.objects.get"]
    JobLauncher       = ["run.jobs.run", "run.jobs.runWithOverrides"]
    ExecutionCanceler = ["run.executions.cancel"]
    SecretCreator     = ["secretmanager.secrets.create"]
    TokenKeeper       = ["secretmanager.secrets.update", "secretmanager.versions.add", "secretmanager.versions.destroy"]
    TokenUser         = ["secretmanager.versions.access", "secretmanager.versions.destroy"]
    Signer            = ["iam.serviceAccounts.signBlob"]
    OperationReader   = ["run.operations.get"]
  }
}

resource "google_service_account" "runtime" {
  for_each = local.runtime_accounts

  account_id   = "gemma-export-${each.key}"
  display_name = each.value

  depends_on = [google_project_service.used]
}

resource "google_service_account" "invoker" {
  for_each = local.invoker_accounts

  account_id   = "gemma-export-${each.key}"
  display_name = each.value

  depends_on = [google_project_service.used]
}

resource "google_project_iam_custom_role" "this" {
  for_each = local.roles

  role_id     = "gemmaExport${each.key}"
  title       = "gemma-export ${each.key}"
  permissions = each.value

  depends_on = [google_project_service.used]
}

# Records: one database, of which IAM knows no parts.

resource "google_project_iam_member" "records" {
  for_each = {
    dispatcher = "RecordsWriter"
    trigger    = "RecordsLauncher"
    sweeper    = "RecordsSweeper"
    exporter   = "RecordsWriter"
  }

  project = var.project_id
  role    = google_project_iam_custom_role.this[each.value].id
  member  = google_service_account.runtime[each.key].member

  condition {
    title      = "the database of exports"
    expression = "resource.name == \"projects/${var.project_id}/databases/${var.firestore_database}\""
  }
}

# Artifacts. Listing is of the bucket as a whole: a condition on a prefix would not hold where Cloud Storage asks whether
# to say 404 or 403 of an object that is missing.

locals {
  artifact_prefixes = ["merged_models/", "gguf_models/"]

  own_objects = {
    dispatcher = { role = "ObjectReader", prefixes = local.artifact_prefixes }
    sweeper    = { role = "ObjectWriter", prefixes = local.artifact_prefixes }
    exporter   = { role = "ObjectWriter", prefixes = concat(local.artifact_prefixes, ["base_models/"]) }
  }

  # gs://BUCKET/PREFIX, each for whoever reads adapters.
  adapter_places = distinct([
    for source in var.adapter_sources : {
      bucket = split("/", source)[2]
      prefix = trimsuffix(join("/", slice(split("/", source), 3, length(split("/", source)))), "/")
    }
  ])

  adapter_access = {
    for pair in setproduct(["dispatcher", "exporter"], local.adapter_places) :
    "${pair[0]} gs://${pair[1].bucket}/${pair[1].prefix}" => merge(pair[1], { account = pair[0] })
  }
}

resource "google_storage_bucket_iam_member" "list" {
  for_each = local.own_objects

  bucket = google_storage_bucket.artifacts.name
  role   = google_project_iam_custom_role.this["ObjectLister"].id
  member = google_service_account.runtime[each.key].member
}

resource "google_storage_bucket_iam_member" "objects" {
  for_each = local.own_objects

  bucket = google_storage_bucket.artifacts.name
  role   = google_project_iam_custom_role.this[each.value.role].id
  member = google_service_account.runtime[each.key].member

  condition {
    title = "what is under ${join(", ", each.value.prefixes)}"
    expression = join(" || ", [
      for prefix in each.value.prefixes :
      "resource.name.startsWith(\"projects/_/buckets/${local.bucket}/objects/${prefix}\")"
    ])
  }
}

resource "google_storage_bucket_iam_member" "own_adapters" {
  for_each = toset(["dispatcher", "exporter"])

  bucket = google_storage_bucket.artifacts.name
  role   = google_project_iam_custom_role.this["ObjectReader"].id
  member = google_service_account.runtime[each.key].member

  condition {
    title      = "adapters"
    expression = "resource.name.startsWith(\"projects/_/buckets/${local.bucket}/objects/adapters/\")"
  }
}

# A bucket may be of another project, which knows none of our roles. Google's own has the list of names too, which is the
# bucket's and of no prefix.
resource "google_storage_bucket_iam_member" "adapters" {
  for_each = local.adapter_access

  bucket = each.value.bucket == local.bucket ? google_storage_bucket.artifacts.name : each.value.bucket
  role   = "roles/storage.objectViewer"
  member = google_service_account.runtime[each.value.account].member

  dynamic "condition" {
    for_each = each.value.prefix == "" ? [] : [each.value.prefix]

    content {
      title      = "adapters"
      expression = "resource.type == \"storage.googleapis.com/Bucket\" || resource.name.startsWith(\"projects/_/buckets/${each.value.bucket}/objects/${condition.value}/\")"
    }
  }
}

# Messages and executions

resource "google_pubsub_topic_iam_member" "publisher" {
  for_each = toset(["dispatcher", "trigger", "sweeper"])

  topic  = google_pubsub_topic.jobs.name
  role   = "roles/pubsub.publisher"
  member = google_service_account.runtime[each.key].member
}

resource "google_cloud_run_v2_job_iam_member" "executions" {
  for_each = {
    dispatcher = "ExecutionCanceler"
    trigger    = "JobLauncher"
  }

  name     = google_cloud_run_v2_job.exporter.name
  location = var.region
  role     = google_project_iam_custom_role.this[each.value].id
  member   = google_service_account.runtime[each.key].member
}

# Tokens. A secret that is about to be made has no name yet that a condition could look at.

resource "google_project_iam_member" "secret_creator" {
  project = var.project_id
  role    = google_project_iam_custom_role.this["SecretCreator"].id
  member  = google_service_account.runtime["dispatcher"].member
}

resource "google_project_iam_member" "tokens" {
  for_each = {
    dispatcher = "TokenKeeper"
    exporter   = "TokenUser"
  }

  project = var.project_id
  role    = google_project_iam_custom_role.this[each.value].id
  member  = google_service_account.runtime[each.key].member

  condition {
    title      = "the tokens of exports"
    expression = "resource.name.startsWith(\"projects/${data.google_project.this.number}/secrets/gemma-export-\")"
  }
}

resource "google_secret_manager_secret_iam_member" "hf_token" {
  count = var.hf_token_secret == null ? 0 : 1

  secret_id = var.hf_token_secret
  role      = "roles/secretmanager.secretAccessor"
  member    = google_service_account.runtime["exporter"].member
}

resource "google_service_account_iam_member" "signer" {
  service_account_id = google_service_account.runtime["dispatcher"].name
  role               = google_project_iam_custom_role.this["Signer"].id
  member             = google_service_account.runtime["dispatcher"].member
}

# Pub/Sub itself: it moves dead letters, and shows the functions a token of the push account.

resource "google_project_service_identity" "pubsub" {
  provider = google-beta

  service = "pubsub.googleapis.com"

  depends_on = [google_project_service.used]
}

locals {
  # By its name: of some services the resource that makes the account does not tell it.
  pubsub_agent = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_pubsub_topic_iam_member" "dead_letters" {
  topic  = google_pubsub_topic.dead_letters.name
  role   = "roles/pubsub.publisher"
  member = local.pubsub_agent

  depends_on = [google_project_service_identity.pubsub]
}

resource "google_pubsub_subscription_iam_member" "dead_letters" {
  subscription = google_pubsub_subscription.start.name
  role         = "roles/pubsub.subscriber"
  member       = local.pubsub_agent

  depends_on = [google_project_service_identity.pubsub]
}

resource "google_service_account_iam_member" "push_tokens" {
  service_account_id = google_service_account.invoker["push"].name
  role               = "roles/iam.serviceAccountOpenIdTokenCreator"
  member             = local.pubsub_agent

  depends_on = [google_project_service_identity.pubsub]
}
