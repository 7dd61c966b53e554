{{/* Name of the controller's objects. Cut to 53 characters, so that suffixes fit. */}}
{{- define "kvcluster.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* Name of cluster-scoped objects: two releases of one name in two namespaces do not share them. */}}
{{- define "kvcluster.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "kvcluster.fullname" .) -}}
{{- end }}

{{- define "kvcluster.selectorLabels" -}}
app.kubernetes.io/name: kvcluster
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: controller
{{- end }}

{{- define "kvcluster.commonLabels" -}}
app.kubernetes.io/name: kvcluster
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "kvcluster.labels" -}}
{{ include "kvcluster.commonLabels" . }}
app.kubernetes.io/component: controller
{{- end }}

{{- define "kvcluster.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kvcluster.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "kvcluster.image" -}}
{{- $repository := .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end }}

{{- define "kvcluster.envoyImage" -}}
{{- with .Values.envoy.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository .tag -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What Kubernetes' restricted profile asks of a pod, and of a container. */}}
{{- define "kvcluster.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.runAsUser }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
fsGroup: {{ int64 . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "kvcluster.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What the controller does in each namespace it serves. */}}
{{- define "kvcluster.rules" -}}
- apiGroups: [kvcluster.dev]
  resources: [kvclusters]
  verbs: [get, list, watch]
- apiGroups: [kvcluster.dev]
  resources: [kvclusters/status]
  verbs: [patch]
# For owner references that block the owner's deletion, where the cluster checks who may set them.
- apiGroups: [kvcluster.dev]
  resources: [kvclusters/finalizers]
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services, configmaps, serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies, ingresses]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [keda.sh]
  resources: [scaledobjects]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors]
  verbs: [get, list, watch, create, patch, delete]
# Patched with the cost of deleting the pod, by reuse score.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, patch]
# Neither is read by itself: it grants this to routers, and nobody can grant what they do not hold.
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
- apiGroups: [llm-d.ai, inference.networking.x-k8s.io]
  resources: [inferenceobjectives]
  verbs: [list, watch]
{{- if not .Values.managementToken.existingSecret }}
# The tokens of routers' management ports. A right to create cannot be bound to names, nor one to get to names that
# nobody knows in advance.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create]
{{- end }}
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end }}

{{- /* A text (the second of the list) whose links to runbooks lead to where they are published. */}}
{{- define "kvcluster.withRunbooks" -}}
{{- $url := (index . 0).Values.runbookUrl | replace "{alert}" "${1}" }}
{{- regexReplaceAll "https://runbooks\\.example\\.com/([A-Za-z]+|\\$\\{__value\\.text\\})" (index . 1) $url }}
{{- end }}
